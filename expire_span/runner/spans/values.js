// The data, how numbers and tokens are written, the soft mask, and colors.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id),
  layers = data.layers.map((_, index) => index);
const dark = matchMedia("(prefers-color-scheme: dark)"),
  colors = () => data.scales[dark.matches ? "dark" : "light"];
// What stands at one place of both texts: tokens from and to, of the text before and after, and whether replaced.
const slots = data.slots ?? data.texts[0].tokens.map((_, index) => [index, index + 1]);
const kept = [new Map(), new Map()]; // of each text: the place in the other one of a token that both have
for (const [from, , newFrom, , isReplaced] of data.slots ?? []) {
  if (isReplaced) continue;
  kept[0].set(from, newFrom);
  kept[1].set(newFrom, from);
}
const state = {
  layer: layers.length > 1 && layers.length <= 4 ? -1 : 0,
  by: "span",
  log: true,
  own: false,
  moment: null,
  at: null,
};
let cells = []; // of each text, each token: its elements, with the layer that they show

function make(tag, attributes = {}, ...children) {
  const element = ["svg", "line", "text", "polyline"].includes(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function number(value, digits = 1) {
  if (value == null) return "–";
  const rounded = Math.round(value * 10 ** digits) / 10 ** digits || 0; // not -0
  return rounded.toLocaleString("en-US", {
    maximumFractionDigits: digits,
    minimumFractionDigits: Math.abs(value) < 1000 ? digits : 0,
  });
}
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const marks = { " ": "·", "\n": "⏎", "\t": "→", "\r": "␍" };
const visible = text =>
  text === ""
    ? "◂"
    : [...text].map(c => marks[c] ?? (c < " " ? String.fromCodePoint(0x2400 + c.codePointAt(0)) : c)).join("");
const shownAs = text => (data.unit === "word" && text !== "\n" ? text.trimEnd() : text);

// Spans and soft mask (section 4.1): a token's memory is seen from later tokens at a distance of at least 1.
const heads = (text, layer, index) => text.spans[layer].map(head => (Array.isArray(head) ? head[index] : head));
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const span = (text, layer, index) => mean(heads(text, layer, index));
const clamp = value => Math.max(0, Math.min(1, value));
function softMask(text, layer, index, moment) {
  const distance = moment - index,
    { ramp, max_distance } = data.layers[layer];
  if (
    distance < 1 ||
    (max_distance != null && distance > max_distance) ||
    (text.reach && distance > text.reach[moment])
  )
    return 0;
  return mean(heads(text, layer, index).map(e => clamp(1 + (e - distance) / ramp)));
}
function alive(text, layer, moment) {
  // the soft mask of each token before the moment, and how many memories there are
  const masks = new Array(moment),
    { ramp, pooled_tokens } = data.layers[layer];
  let count = 0;
  for (let index = 0; index < moment; index++) count += (masks[index] = softMask(text, layer, index, moment)) > 0;
  for (const [time, least, e] of text.pooled[layer]) {
    const distance = moment - time,
      m = clamp(1 + (e - distance) / ramp);
    if (distance < least || m === 0 || (text.reach && distance > text.reach[moment])) continue;
    count++;
    for (let index = time + 1; index <= Math.min(time + pooled_tokens, moment - 1); index++)
      masks[index] = Math.max(masks[index] ?? 0, m);
  }
  return { masks, count };
}

// Colors
const ranges = {};
function range(layer) {
  // the smallest and the largest span of all texts
  const key = state.own ? layer : -1;
  if (!(key in ranges)) {
    const spans = data.texts.flatMap(text =>
      (key < 0 ? layers : [key]).flatMap(member => text.tokens.map((_, index) => span(text, member, index))),
    );
    const [low, high] = spans.reduce(([low, high], e) => [Math.min(low, e), Math.max(high, e)], [Infinity, 1]);
    ranges[key] = [high > low * 1.01 ? low : 0, high];
  }
  return ranges[key];
}
const known = name => data.texts.flatMap(text => text[name] ?? []).filter(value => value != null);
const quantile = (values, share) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(share * (sorted.length - 1))] ?? 1;
};
const maxBits = Math.max(1, quantile(known("bits"), 0.99)),
  maxChange = Math.max(0.1, quantile(known("more_bits").map(Math.abs), 0.99));
const maskShare = m => 0.12 + 0.8 * m; // so that what has almost faded can still be seen
const scaled = value => (state.log ? Math.log1p(value) : value);
const share = (value, [low, high]) => (scaled(value) - scaled(low)) / (scaled(high) - scaled(low));
function fill(element, scale, position) {
  const color = scale[Math.round(clamp(position) * (scale.length - 1))];
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
  element.style.background = color;
  element.style.color = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#1b1915" : "#f7f4ee";
}
function clear(element) {
  element.style.background = element.style.color = "";
}
