"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id), layers = data.layers.map((_, index) => index);
const dark = matchMedia("(prefers-color-scheme: dark)"), colors = () => data.scales[dark.matches ? "dark" : "light"];
const slots = data.slots ?? data.texts[0].tokens.map((_, index) => [index, index + 1]);  // what stands above one another: places before, places after, whether replaced
const kept = [new Map(), new Map()], replaced = [new Set(), new Set()];  // by place: that in the other text; what is only in this one
for (const [from, to, from2, to2, changed] of data.slots ?? []) {
  if (changed) { for (let index = from; index < to; index++) replaced[0].add(index); for (let index = from2; index < to2; index++) replaced[1].add(index); } else { kept[0].set(from, from2); kept[1].set(from2, from); }
}
const state = { layer: layers.length > 1 && layers.length <= 4 ? -1 : 0, by: "span", log: true, own: false, moment: null, at: null };
let cells = [];  // of each text, each token: its elements, with the layer that they show

function make(tag, attributes = {}, ...children) {
  const element = ["svg", "line", "text", "polyline"].includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function number(value, digits = 1) {
  if (value == null) return "–";
  const rounded = Math.round(value * 10 ** digits) / 10 ** digits || 0;  // not -0
  return rounded.toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: Math.abs(value) < 1000 ? digits : 0 });
}
const marks = { " ": "·", "\n": "⏎", "\t": "→", "\r": "␍" };
const visible = text => text === "" ? "◂" : [...text].map(c => marks[c] ?? (c < " " ? String.fromCodePoint(0x2400 + c.codePointAt(0)) : c)).join("");
const shownAs = text => data.unit === "word" && text !== "\n" ? text.trimEnd() : text;

// Spans and soft mask (section 4.1): a token's memory is seen from later tokens at a distance of at least 1.
const spanOfHead = (head, index) => Array.isArray(head) ? head[index] : head;
const heads = (text, layer, index) => text.spans[layer].map(head => spanOfHead(head, index));
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
const span = (text, layer, index) => mean(heads(text, layer, index));
const clamp = value => Math.max(0, Math.min(1, value));
function softMask(text, layer, index, moment) {
  const distance = moment - index, { ramp, max_distance } = data.layers[layer];
  if (distance < 1 || (max_distance != null && distance > max_distance) || (text.reach && distance > text.reach[moment])) return 0;
  return mean(heads(text, layer, index).map(e => clamp(1 + (e - distance) / ramp)));
}
function alive(text, layer, moment) {  // the soft mask of each token before the moment, and how many memories there are
  const masks = new Array(moment), { ramp, pooled_tokens } = data.layers[layer];
  let count = 0;
  for (let index = 0; index < moment; index++) count += (masks[index] = softMask(text, layer, index, moment)) > 0;
  for (const [time, least, e] of text.pooled[layer]) {
    const distance = moment - time, m = clamp(1 + (e - distance) / ramp);
    if (distance < least || m === 0 || (text.reach && distance > text.reach[moment])) continue;
    count++;
    for (let index = time + 1; index <= Math.min(time + pooled_tokens, moment - 1); index++) masks[index] = Math.max(masks[index] ?? 0, m);
  }
  return { masks, count };
}

// Colors
const ranges = {};
function range(layer) {  // the smallest and the largest span of all texts
  const key = state.own ? layer : -1;
  if (!(key in ranges)) {
    const spans = data.texts.flatMap(text => (key < 0 ? layers : [key]).flatMap(which => text.tokens.map((_, index) => span(text, which, index))));
    const [low, high] = spans.reduce(([low, high], e) => [Math.min(low, e), Math.max(high, e)], [Infinity, 1]);
    ranges[key] = [high > low * 1.01 ? low : 0, high];
  }
  return ranges[key];
}
const known = name => data.texts.flatMap(text => text[name] ?? []).filter(value => value != null);
const quantile = (values, share) => { const sorted = [...values].sort((a, b) => a - b); return sorted[Math.floor(share * (sorted.length - 1))] ?? 1; };
const maxBits = Math.max(1, quantile(known("bits"), 0.99)), maxChange = Math.max(0.1, quantile(known("more_bits").map(Math.abs), 0.99));
const scaled = value => state.log ? Math.log1p(value) : value;
const share = (value, [low, high]) => (scaled(value) - scaled(low)) / (scaled(high) - scaled(low));
function fill(element, scale, position) {
  const color = scale[Math.round(clamp(position) * (scale.length - 1))];
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
  element.style.background = color;
  element.style.color = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#1b1915" : "#f7f4ee";
}
function clear(element) { element.style.background = element.style.color = ""; }

function paint() {
  data.texts.forEach((text, number) => {
    const moment = state.moment?.[number] ?? null, { spans, changes } = colors();
    const living = moment == null ? null : layers.map(layer => alive(text, layer, moment));
    cells[number].forEach((elements, index) => elements.forEach(({ element, layer }) => {
      element.className = "c";
      if (replaced[number].has(index)) element.classList.add("changed");
      clear(element);
      if (living) {
        const m = living[layer].masks[index] ?? 0;
        if (index === moment) element.classList.add("now");
        else if (index > moment) element.classList.add("later");
        else if (m > 0) fill(element, spans, 0.12 + 0.8 * m);
        else element.classList.add("gone");
      } else if (state.by === "span") fill(element, spans, share(span(text, layer, index), range(layer)));
      else if (state.by === "bits" && text.bits[index] != null) fill(element, spans, text.bits[index] / maxBits);
      else if (state.by === "more_bits" && text.more_bits[index] != null) fill(element, changes, 0.5 + text.more_bits[index] / maxChange / 2);
    }));
  });
  legend();
  tellMoment();
  tables();
}

function ticks(limits) {
  const [low, high] = limits;
  if (!state.log) return [0, 1, 2, 3, 4].map(part => low + part * (high - low) / 4);
  const round = [1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5].filter(value => share(value, limits) > 0.09 && share(value, limits) < 0.9);
  return [low, ...round, high];
}
function legend() {
  const { spans, changes } = colors();
  let scale = spans, labels, title;
  if (state.moment) [labels, title] = [[0, 0.25, 0.5, 0.75, 1].map(m => [m, m === 0 ? "gone" : String(m)]), "soft mask m at that moment"], scale = spans.map((_, index) => spans[Math.round(spans.length * (0.12 + 0.8 * index / spans.length))]);
  else if (state.by === "span") {
    const limits = range(Math.max(0, state.layer));
    [labels, title] = [ticks(limits).map(value => [share(value, limits), number(value, limits[1] < 20 ? 1 : 0)]), "span in timesteps" + (state.own && state.layer < 0 ? ", of layer 0" : "")];
  } else if (state.by === "bits") [labels, title] = [[0, 0.25, 0.5, 0.75, 1].map(part => [part, number(part * maxBits)]), "loss in bits"];
  else [scale, labels, title] = [changes, [-1, -0.5, 0, 0.5, 1].map(part => [0.5 + part / 2, (part > 0 ? "+" : "") + number(part * maxChange, 2)]), `bits more with spans of at most ${number(data.span_cap, 0)}`];
  const strip = make("i");
  strip.style.background = `linear-gradient(to right, ${scale.join(",")})`;
  const numbers = make("span");
  for (const [place, label] of labels) {
    const tick = make("b", {}, label);
    tick.style.left = `${100 * place}%`;
    if (place < 0.06) tick.style.transform = "none";
    if (place > 0.94) tick.style.transform = "translateX(-100%)";
    numbers.append(tick);
  }
  byId("legend").replaceChildren(make("span", { class: "soft" }, title), strip, numbers);
}
function tellMoment() {
  const line = byId("moment");
  if (!state.moment) return line.replaceChildren(`Click a ${data.unit} to see which memories are still alive when it is read. Hover for numbers; with the keyboard: Tab, arrows, Enter, Escape.`);
  const parts = data.texts.map((text, place) => {
    const moment = state.moment[place];
    const counts = layers.map(layer => `layer ${layer} still has ${number(alive(text, layer, moment).count, 0)}`).join(", ");
    return `${data.texts.length > 1 ? ["before: ", "after: "][place] : ""}when it reads ${data.unit} ${number(moment, 0)} (${label(place, moment)}), ${counts}`;
  });
  const back = make("button", { type: "button" }, "back to spans");
  back.onclick = () => choose(null);
  line.replaceChildren(`Memories alive ${parts.join("; ")}. `, back);
}

// The text
const showsLayers = () => state.by === "span" || state.moment !== null;
function cell(number, index, layer) {
  const element = make("span", { class: "c" }, label(number, index));
  element.place = [number, index];
  cells[number][index].push({ element, layer });
  return element;
}
function render() {
  cells = data.texts.map(text => text.tokens.map(() => []));
  const box = make("div", { class: "text", tabindex: 0, role: "group", "aria-label": "The text" });
  byId("main").replaceChildren(box);
  if (data.texts.length === 1 && (state.layer >= 0 || !showsLayers())) flow(box);
  else stack(box);
  paint();
}
function flow(box) {  // one layer, in the lines of the text
  data.texts[0].tokens.forEach((token, index) => {
    box.append(cell(0, index, Math.max(0, state.layer)));
    if (token.includes("\n")) box.append(make("br"));
    else if (data.unit === "word") box.append(" ");
    else if (token === " ") box.append(make("wbr"));
  });
}
const label = (number, index) => visible(shownAs(data.texts[number].tokens[index]));
const gap = data.unit === "word" ? " " : "";
const slotText = (slot, number) => { let text = ""; for (let index = slot[2 * number]; index < slot[2 * number + 1]; index++) text += label(number, index) + gap; return text; };
const slotWidth = slot => Math.max(...data.texts.map((_, number) => [...slotText(slot, number)].length));
function stack(box) {  // layers, and the text before and after a replacement, one above the other
  const probe = make("span", {}, "0".repeat(50));
  box.append(probe);
  const columns = Math.max(20, Math.floor((box.clientWidth - 140) / (probe.getBoundingClientRect().width / 50)));
  probe.remove();
  const shown = !showsLayers() ? [0] : state.layer < 0 ? layers : [state.layer];
  for (let start = 0; start < slots.length;) {
    let end = start, width = 0, afterSpace = 0;
    for (; end < slots.length; end++) {
      width += slotWidth(slots[end]);
      if (width > columns && end > start) { end = afterSpace || end; break; }
      if (/\s$/.test(data.texts[0].tokens[slots[end][1] - 1])) afterSpace = end + 1;
    }
    const rows = make("div", { class: "rows" });
    for (const layer of shown) data.texts.forEach((_, number) => {
      const name = [...(showsLayers() ? [`layer ${layer}`] : []), ...(data.texts.length > 1 ? [["before", "after"][number]] : [])].join(" ");
      const line = make("span");
      for (const slot of slots.slice(start, end)) {
        for (let index = slot[2 * number]; index < slot[2 * number + 1]; index++) line.append(cell(number, index, layer), gap);
        line.append(" ".repeat(slotWidth(slot) - [...slotText(slot, number)].length));
      }
      rows.append(make("div", {}, make("i", {}, name), line));
    });
    box.append(rows);
    start = end;
  }
}

// What the reader does
function counterpart(number, index) {  // the same token of the other text, or null
  if (data.texts.length < 2) return null;
  return kept[number].get(index) ?? null;
}
function choose(place) {
  const before = showsLayers();
  if (place === null || state.moment?.[place[0]] === place[1]) {
    state.moment = null;
    history.replaceState(null, "", "#");
  } else {
    const [number, index] = place, moment = [index];
    if (data.texts.length > 1) {
      let other = null;
      for (let from = index; other === null && from < data.texts[number].tokens.length; from++) other = counterpart(number, from);
      moment[number] = index;
      moment[1 - number] = other ?? data.texts[1 - number].tokens.length - 1;
    }
    state.moment = moment;
    history.replaceState(null, "", `#${moment[0]}`);  // the address shows this moment again
  }
  showsLayers() === before ? paint() : render();
}
function tell(place, box) {
  const tip = byId("tip"), [number_, index] = place, text = data.texts[number_], moment = state.moment?.[number_];
  const other = counterpart(number_, index), table = make("table");
  const row = (...values) => table.append(make("tr", {}, ...values.map(value => make("td", {}, value))));
  const before = moment != null && index < moment;
  row("", "span", ...(other !== null ? [number_ ? "before" : "after"] : []), ...(before ? ["m"] : []));
  for (const layer of layers) {
    const values = heads(text, layer, index);
    const range = Math.max(...values) - Math.min(...values) > 0.05 ? ` (heads ${number(Math.min(...values))} to ${number(Math.max(...values))})` : "";
    row(`layer ${layer}`, number(span(text, layer, index)) + range, ...(other !== null ? [number(span(data.texts[1 - number_], layer, other))] : []),
      ...(before ? [number(alive(text, layer, moment).masks[index] ?? 0, 2)] : []));
  }
  const lines = [make("div", {}, make("b", {}, visible(shownAs(text.tokens[index]))), ` ${data.unit} ${index}` + (before ? `, ${moment - index} timesteps before the moment` : "")), table];
  if (text.bits[index] != null) lines.push(make("div", {}, `loss ${number(text.bits[index], 2)} bits` + (text.more_bits?.[index] != null ? `, with spans of at most ${data.span_cap}: ${text.more_bits[index] > 0 ? "+" : ""}${number(text.more_bits[index], 2)}` : "")));
  tip.replaceChildren(...lines);
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 8, box.left))}px`;
  tip.style.top = `${box.bottom + height + 12 < innerHeight ? box.bottom + 6 : Math.max(4, box.top - height - 6)}px`;
}
const hide = () => { byId("tip").style.display = "none"; };
byId("main").addEventListener("mouseover", event => event.target.place ? tell(event.target.place, event.target.getBoundingClientRect()) : hide());
byId("main").addEventListener("mouseleave", hide);
byId("main").addEventListener("click", event => { if (event.target.place) choose(event.target.place); });
document.addEventListener("keydown", event => { if (event.key === "Escape") { hide(); if (state.moment) choose(null); } });
byId("main").addEventListener("keydown", event => {
  const [number, at] = state.at ?? [0, -1], last = data.texts[number].tokens.length - 1;
  const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last };
  if (event.key in steps) move(number, Math.max(0, Math.min(last, steps[event.key])));
  else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && data.texts.length > 1 && at >= 0) {
    const other = event.key === "ArrowUp" ? 0 : 1;
    if (other !== number) move(other, counterpart(number, at) ?? 0);
  } else if ((event.key === "Enter" || event.key === " ") && at >= 0) { choose([number, at]); move(number, at); } else return;
  event.preventDefault();
});
function move(number, index) {
  const before = state.at && cells[state.at[0]][state.at[1]];
  before?.forEach(({ element }) => element.classList.remove("at"));
  state.at = [number, index];
  const elements = cells[number][index];
  elements.forEach(({ element }) => element.classList.add("at"));
  elements[0].element.scrollIntoView({ block: "nearest" });
  tell(state.at, elements[elements.length - 1].element.getBoundingClientRect());
}

function tools() {
  const tabs = make("div", { role: "tablist", "aria-label": "Layer" });
  const choices = [...(layers.length > 1 ? [[-1, "all layers"]] : []), ...layers.map(layer => [layer, `layer ${layer}`])];
  choices.forEach(([layer, name], place) => {
    const tab = make("button", { type: "button", role: "tab", "aria-selected": layer === state.layer, tabindex: layer === state.layer ? 0 : -1 }, name);
    tab.onclick = () => { state.layer = layer; update(); render(); };
    tab.onkeydown = event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { const next = tabs.children[(place + step + choices.length) % choices.length]; next.focus(); next.click(); }
    };
    tabs.append(tab);
  });
  const update = () => [...tabs.children].forEach((tab, place) => {
    tab.setAttribute("aria-selected", choices[place][0] === state.layer);
    tab.tabIndex = choices[place][0] === state.layer ? 0 : -1;
  });
  const option = (value, name) => make("option", { value }, name);
  const by = make("select", { "aria-label": "Color by" }, option("span", "span"), ...(known("bits").length ? [option("bits", "loss")] : []), ...(known("more_bits").length ? [option("more_bits", "loss with capped spans")] : []));
  by.onchange = () => { state.by = by.value; state.moment = null; render(); };
  const scale = make("select", { "aria-label": "Scale of the spans" }, option("log", "logarithmic"), option("linear", "linear"));
  scale.onchange = () => { state.log = scale.value === "log"; paint(); };
  const own = make("input", { type: "checkbox" });
  own.onchange = () => { state.own = own.checked; paint(); };
  byId("tools").replaceChildren(tabs, make("label", {}, "color by ", by), make("label", {}, "scale ", scale),
    ...(layers.length > 1 ? [make("label", {}, own, " each layer its own")] : []), make("div", { id: "legend" }));
}

// Above and below the text
function head() {
  const facts = make("dl");
  for (const [name, value] of Object.entries(data.facts)) facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  const parts = [make("h1", {}, document.title), facts];
  data.texts.forEach((text, index) => {
    const name = index ? "With the replacement" : `Text: ${data.source}`;
    const of = data.length > text.tokens.length && !index ? ` of ${number(data.length, 0)}` : "";
    const seen = layers.map(layer => number(text.memory[`memory/size_layer_${layer}`])).join(", ");
    const held = layers.map(layer => number(text.memory[`memory/held_layer_${layer}`])).join(", ");
    const results = Object.entries(text.result).map(([metric, value]) => `${number(value, 3)} ${metric}`);
    parts.push(make("p", {}, make("b", {}, name), `: ${[`${number(text.tokens.length, 0)}${of} ${data.unit}s`, ...results].join(", ")}; memories that a query sees, by layer: ${seen}; that a layer holds: ${held}.`));
  });
  const isConstant = data.texts[0].spans.flat().every(head => !Array.isArray(head));
  if (isConstant) parts.push(make("p", {}, "The spans of this model do not depend on the text: " + layers.map(layer => `layer ${layer} ${[...new Set(data.texts[0].spans[layer].map(head => number(head)))].join(", ")}`).join("; ") + "."));
  byId("head").replaceChildren(...parts);
}
function groupTable(rows, label) {
  const bits = rows.some(row => row.bits[0] != null), more = rows.some(row => row.bits[1] != null);
  const header = [label, "number", ...layers.map(layer => `layer ${layer}`), ...(bits ? ["loss, bits"] : []), ...(more ? [`with spans ≤ ${data.span_cap}`] : [])];
  const table = make("table", {}, make("tr", {}, ...header.map(name => make("th", { scope: "col" }, name))));
  for (const row of rows) {
    const line = make("tr", {}, make("td", {}, row.name), make("td", {}, number(row.count, 0)));
    row.spans.forEach((value, layer) => {
      const box = make("td", {}, number(value));
      fill(box, colors().spans, share(value, range(layer)));
      line.append(box);
    });
    if (bits) line.append(make("td", {}, number(row.bits[0], 2)));
    if (more) line.append(make("td", {}, (row.bits[1] > 0 ? "+" : "") + number(row.bits[1], 3)));
    table.append(line);
  }
  return make("div", { class: "wide" }, table);
}
function tables() {
  const parts = [make("h2", {}, "Mean span by kind, in timesteps"), groupTable(data.texts[0].groups.filter(row => row.name !== "replaced"), "kind")];
  if (data.texts.length > 1) {
    const rows = data.texts.flatMap((text, index) => text.groups.filter(row => row.name === "replaced").map(row => ({ ...row, name: data.replacements.map(pair => pair[index] || "(nothing)").join(", ") })));
    parts.push(make("h2", {}, "What was replaced, and by what"), groupTable(rows, "text"));
  }
  byId("tables").replaceChildren(...parts);
}
function curves() {
  if (!data.curves) return;
  const { size, count, runs, excerpts } = data.curves, width = 1000, height = 280, left = 44, right = 12, top = 12, bottom = 30;
  const strokes = dark.matches ? ["#78b7ee", "#f0a35e", "#8fd19e", "#e58bb6"] : ["#0b61a4", "#c2571a", "#2f7d46", "#a8326c"];
  const highest = Math.max(0.1, ...runs.flatMap(run => run.bits.filter(value => value != null)));
  const x = window => left + (width - left - right) * Math.min(count, (window + 0.5) * size) / count, y = value => top + (height - top - bottom) * (1 - value / highest);
  const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Loss along the data" });
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5].find(step => highest / step <= 6) ?? 10;
  for (let value = 0; value <= highest; value += step) chart.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, step < 0.1 ? 2 : 1)));
  for (let part = 0; part <= 4; part++) chart.append(make("text", { x: left + (width - left - right) * part / 4, y: height - 10, "text-anchor": part === 4 ? "end" : "middle" }, number(count * part / 4, 0)));
  runs.forEach((run, index) => chart.append(make("polyline", { fill: "none", stroke: strokes[index % 4], "stroke-width": 1.6, "stroke-dasharray": index > 3 ? "5 3" : null, points: run.bits.map((value, window) => value == null ? "" : `${x(window)},${y(value)}`).join(" ") })));
  const guide = make("line", { class: "grid", y1: top, y2: height - bottom, x1: -9, x2: -9 });
  chart.append(guide);
  const told = make("p", { class: "soft" }, "Hover over the curve for its numbers and the text there.");
  chart.addEventListener("mousemove", event => {
    const box = chart.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    const window = Math.max(0, Math.min(excerpts.length - 1, Math.floor((place - left) / (width - left - right) * count / size)));
    guide.setAttribute("x1", x(window));
    guide.setAttribute("x2", x(window));
    told.replaceChildren(`from ${data.unit} ${number(window * size, 0)}: ${runs.map(run => `${run.name} ${number(run.bits[window], 2)}`).join(", ")}. `, make("code", {}, visible(excerpts[window])));
  });
  const names = make("p");
  runs.forEach((run, index) => { const name = make("b", {}, `— ${run.name}  `); name.style.color = strokes[index % 4]; names.append(name); });
  byId("curves").replaceChildren(make("h2", {}, `Loss along the data, in bits per ${data.unit}, means of ${number(size, 0)} ${data.unit}s`), names, chart, told);
}
function foot() {
  byId("foot").replaceChildren(make("h2", {}, "How to read this"),
    make("p", {}, `Each ${data.unit} becomes a memory of each layer, whose span says for how many timesteps it has full weight. Then it fades over the ramp R and is deleted.${data.texts.some(text => text.pooled.some(rows => rows.length)) ? " Means of several older memories count as one, and all of their text is colored." : ""} Where heads have different spans, colors show their mean. · is a space, ⏎ a line break${data.unit === "byte" ? ", ◂ a byte of a character that goes on" : ""}. The loss of a ${data.unit} is what predicting it cost, with all that was read before.`),
    make("p", {}, "Figures 9 and 12 of the paper are the colored text, figure 10 the loss with capped spans, figure 13 the loss along the data."), make("p", {}, make("code", {}, data.command)));
}
const start = () => { head(); tools(); render(); curves(); foot(); };
addEventListener("resize", () => { clearTimeout(state.timer); state.timer = setTimeout(render, 200); });
dark.addEventListener("change", () => { paint(); curves(); });
start();
const linked = Number(location.hash.slice(1) || "x");
if (Number.isInteger(linked) && linked >= 0 && linked < data.texts[0].tokens.length) choose([0, linked]);
