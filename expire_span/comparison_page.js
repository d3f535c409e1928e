// The page of `expire-span-report --html`: everything that depends on filters and choices, from the data beside it.
// Texts of runs reach the page by textContent, or escaped where plotly would read tags in them.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs.map((run) => ({ ...run, ...data.groups[run.group], place: run.group }));
const DEFAULTS = {
  quality: "", quality_log: "", cost: "memory/held", cost_log: "",
  curve: "", curve_log: "", time: "update", time_log: "", smoothing: "0", sort: "", order: "",
};
const TIMES = { update: "update", tokens: "tokens", hours: "hours of training" };
const LOG_NOTE = " A log axis leaves out values of 0 and below.";
const COLORS = [[352, 57], [197, 50], [38, 75], [150, 42], [275, 38], [0, 0], [18, 45], [225, 45]]; // hue, saturation
const DASHES = ["solid", "dash", "dot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star", "cross"];

const value = (table, name) => (Object.hasOwn(table, name) ? table[name] : null);
const distinct = (values) => [...new Set(values)];
const byId = (id) => document.getElementById(id);
const escaped = (text) => String(text).replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);
const text = (setting) => (setting === null ? "none" : String(setting));
const compare = (a, b) => {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : text(a).localeCompare(text(b));
};

// What runs can be filtered by: those of which there are several values.
const FILTERS = Object.fromEntries([
  ["task", (run) => run.task],
  ["model", (run) => run.model],
  ["seed", (run) => run.seed],
  ...data.settings.map((name) => [name, (run) => value(run.settings, name)]),
].filter(([, of]) => distinct(runs.map(of)).length > 1));
const models = distinct(runs.map((run) => run.model)).sort();

let chosen, view; // values of each filter (none: all), and the choices of the page: both are what the address says

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  chosen = Object.fromEntries(Object.entries(FILTERS).map(([name, of]) => {
    const known = new Set(runs.map((run) => text(of(run))));
    return [name, new Set(address.getAll(name).filter((one) => known.has(one)))];
  }));
  view = Object.fromEntries(Object.entries(DEFAULTS).map(([name, first]) => [name, address.get(`view.${name}`) ?? first]));
}

function writeAddress() {
  const address = new URLSearchParams();
  for (const [name, values] of Object.entries(chosen)) for (const one of values) address.append(name, one);
  for (const [name, first] of Object.entries(DEFAULTS)) if (view[name] !== first) address.set(`view.${name}`, view[name]);
  history.replaceState(null, "", `#${address}`);
}

const passes = (run, without) =>
  Object.entries(FILTERS).every(([name, of]) => name === without || !chosen[name].size || chosen[name].has(text(of(run))));

function update() {
  writeAddress();
  draw();
}

function draw() {
  const selected = runs.filter((run) => passes(run));
  const groups = distinct(selected.map((run) => run.place)).sort((a, b) => a - b).map((place) => {
    const members = selected.filter((run) => run.place === place);
    return { ...data.groups[place], place, members };
  });
  for (const group of groups) group.label = label(group, groups);
  byId("count").textContent = runs.length
    ? `${selected.length} of ${runs.length} runs, in ${groups.length} of ${data.groups.length} groups of seeds`
    : "No finished run.";
  drawFilters();
  const quality = drawQuality(selected, groups);
  drawCurves(selected, groups, quality ?? "");
  drawTable(groups);
}

// The settings that tell a group from others of its task and model; one of several that always differ together.
function label(group, groups) {
  const peers = groups.filter((other) => other.task === group.task && other.model === group.model);
  const parts = new Map();
  for (const name of data.settings) {
    const values = peers.map((peer) => text(value(peer.settings, name)));
    const key = JSON.stringify(values);
    if (distinct(values).length > 1 && !parts.has(key)) parts.set(key, `${name} ${text(value(group.settings, name))}`);
  }
  const task = distinct(groups.map((other) => other.task)).length > 1 ? [group.task] : [];
  return [...task, group.model, ...parts.values()].join(", ");
}

// A hue for each model; a lightness and a dash for each of its groups within a task.
function style(group) {
  const peers = data.groups.map((other, place) => ({ ...other, place }))
    .filter((other) => other.task === group.task && other.model === group.model);
  const rank = peers.findIndex((peer) => peer.place === group.place);
  const lightness = peers.length > 1 ? 32 + (34 * rank) / (peers.length - 1) : 48;
  return { color: color(group.model, lightness), dash: DASHES[rank % DASHES.length] };
}

function color(model, lightness = 48) {
  const [hue, saturation] = COLORS[models.indexOf(model) % COLORS.length];
  return `hsl(${hue}, ${saturation}%, ${lightness}%)`;
}

function drawFilters() {
  byId("filters").replaceChildren(...Object.entries(FILTERS).flatMap(([name, of]) => {
    const matched = new Set(runs.filter((run) => passes(run, name)).map((run) => text(of(run))));
    const values = distinct(runs.map(of)).sort(compare).map(text);
    const buttons = values.map((one) => {
      const button = element("button", one, matched.has(one) ? "" : "unmatched");
      button.setAttribute("aria-pressed", chosen[name].has(one));
      button.onclick = () => {
        if (!chosen[name].delete(one)) chosen[name].add(one);
        update();
        [...byId("filters").querySelectorAll("button")].find((other) => other.title === button.title).focus();
      };
      button.title = `${name}: ${one}`;
      return button;
    });
    const row = element("div");
    row.append(...buttons);
    return [element("span", name, "name"), row];
  }));
}

function element(tag, content = "", className = "") {
  const node = document.createElement(tag);
  node.textContent = content;
  if (className) node.className = className;
  return node;
}

// Fill a select with groups of options, and return its choice: that of the address if there is one, else the default.
function choose(id, sections, first) {
  const select = byId(id);
  const names = Object.values(sections).flat();
  const choice = names.includes(view[id]) ? view[id] : first;
  select.replaceChildren(...Object.entries(sections).filter(([, members]) => members.length).map(([title, members]) => {
    const section = element("optgroup");
    section.label = title;
    section.append(...members.map((name) => new Option(TIMES[name] ?? name, name, false, name === choice)));
    return section;
  }));
  return choice;
}

function drawQuality(selected, groups) {
  const known = distinct(selected.flatMap((run) => Object.keys(run.metrics)));
  const results = data.results.filter((name) => known.includes(name) && !name.startsWith("paper: "));
  const others = known.filter((name) => !results.includes(name) && !name.startsWith("paper: ")).sort();
  const preferred = results.find((name) => name.startsWith("test/")) ?? results[0] ?? others[0];
  const quality = choose("quality", { "results of the tasks": results, "all others": others }, preferred);
  const costs = data.costs.filter((name) => known.includes(name));
  const cost = choose("cost", { costs }, costs.includes(DEFAULTS.cost) ? DEFAULTS.cost : costs[0]);
  const point = (run) => ({ x: value(run.metrics, cost), y: value(run.metrics, quality), run });
  const shownTasks = distinct(groups.map((group) => group.task));
  const traces = [];
  let shown = 0;
  for (const task of shownTasks) {
    for (const model of models) {
      const rows = groups.filter((group) => group.task === task && group.model === model).map((group) => {
        const points = group.members.map(point).filter(({ x, y }) => x !== null && y !== null);
        return { group, points, x: mean(points.map(({ x }) => x)), y: mean(points.map(({ y }) => y)) };
      }).filter((row) => row.points.length).sort((a, b) => a.x - b.x);
      if (!rows.length) continue;
      const points = rows.flatMap((row) => row.points.map((one) => ({ ...one, group: row.group })));
      shown += points.length;
      const name = escaped(shownTasks.length > 1 ? `${task}, ${model}` : model);
      const common = { name, legendgroup: `${task}, ${model}`, hovertemplate: "%{text}<extra></extra>" };
      const symbol = SYMBOLS[shownTasks.indexOf(task) % SYMBOLS.length];
      traces.push({
        ...common, mode: "markers", showlegend: false, marker: { size: 7, symbol, color: color(model), opacity: 0.45 },
        x: points.map(({ x }) => x), y: points.map(({ y }) => y),
        text: points.map(({ x, y, run, group }) => hover(group, run, [[quality, y], [cost, x]])),
      }, {
        ...common, mode: "lines+markers", line: { color: color(model), width: 2 }, marker: { size: 10, symbol },
        x: rows.map(({ x }) => x), y: rows.map(({ y }) => y),
        text: rows.map(({ group, points, x, y }) =>
          `<b>mean of ${points.length}</b><br>${hover(group, null, [[quality, y], [cost, x]])}`),
      });
    }
  }
  plot("quality_plot", traces, [cost, view.cost_log], [quality, view.quality_log]);
  byId("quality_count").textContent =
    `${shown} of ${selected.length} runs have both. Small: each seed; large: their mean. The line joins a model's means.`
    + (view.quality_log || view.cost_log ? LOG_NOTE : "");
  return quality;
}

function drawCurves(selected, groups, quality) {
  const known = distinct(selected.flatMap((run) => Object.keys(run.curves))).sort();
  const sections = Object.create(null); // a metric may be called __proto__/...
  for (const name of known) (sections[name.split("/")[0]] ??= []).push(name);
  const several = (name) => selected.some((run) => (value(run.curves, name)?.[1].length ?? 0) > 1);
  const metrics = distinct([quality.split("/").at(-1), ...selected.map((run) => run.metric)]);
  const preferred = metrics.flatMap((metric) => ["valid/", "valid/rl/", "rl/", "train/"].map((split) => split + metric));
  const curve = choose("curve", sections, [...preferred, "train/loss", ...known].find(several) ?? known[0]);
  const time = choose("time", { against: Object.keys(TIMES) }, "update");
  const smoothing = Number(view.smoothing) || 0;
  const traces = [];
  let shown = 0;
  for (const group of groups) {
    const { color, dash } = style(group);
    const lines = group.members.map((run) => line(run, curve, time, smoothing)).filter((one) => one);
    if (!lines.length) continue;
    shown += lines.length;
    const common = { legendgroup: String(group.place), hovertemplate: "%{text}<extra></extra>" };
    if (lines.length > 1) {
      for (const { x, y, run } of lines) {
        traces.push({
          ...common, x, y, mode: mode(x), showlegend: false, opacity: 0.4, line: { color, width: 1 }, marker: { size: 4 },
          text: x.map((at, i) => hover(group, run, [[curve, y[i]], [time, at]])),
        });
      }
    }
    const { x, y } = lines.length > 1 ? meanLine(lines) : lines[0];
    const title = lines.length > 1 ? `<b>mean of ${lines.length}</b><br>` : "";
    traces.push({
      ...common, x, y, name: escaped(group.label), mode: mode(x), line: { color, width: 2.5, dash }, marker: { size: 8 },
      text: x.map((at, i) => title + hover(group, lines.length > 1 ? null : lines[0].run, [[curve, y[i]], [time, at]])),
    });
  }
  plot("curve_plot", traces, [TIMES[time], view.time_log], [curve, view.curve_log]);
  byId("curve_count").textContent = `${shown} of ${selected.length} runs have this curve, thinned to at most `
    + `${data.max_points} points. Thin: each seed; thick: their mean where all have values.`
    + (time === "hours" ? " Hours are those of training steps, without evaluation." : "")
    + (view.curve_log || view.time_log ? LOG_NOTE : "");
}

const mode = (x) => (x.length > 1 ? "lines" : "markers");

// One run's curve; smoothed by an exponential mean that starts without a bias.
function line(run, curve, time, smoothing) {
  const [place, values] = value(run.curves, curve) ?? [];
  if (!values) return null;
  const axis = { ...run.axes[place] };
  axis.tokens = run.tokens_per_update && axis.update.map((update) => update * run.tokens_per_update);
  const x = axis[time];
  if (!x) return null;
  let sum = 0;
  let weight = 0;
  const y = values.map((one) => {
    sum = smoothing * sum + (1 - smoothing) * one;
    weight = smoothing * weight + (1 - smoothing);
    return sum / weight;
  });
  return { x, y, run };
}

// Mean of several curves at all of their places, between which each is taken as straight.
function meanLine(lines) {
  const first = Math.max(...lines.map(({ x }) => x[0]));
  const last = Math.min(...lines.map(({ x }) => x.at(-1)));
  const x = distinct(lines.flatMap((one) => one.x)).filter((at) => at >= first && at <= last).sort((a, b) => a - b);
  return { x, y: x.map((at) => mean(lines.map((one) => interpolate(one, at)))) };
}

function interpolate({ x, y }, at) {
  let low = 0;
  let high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle;
    else high = middle;
  }
  if (x[high] <= at) return y[high];
  return y[low] + ((at - x[low]) / (x[high] - x[low])) * (y[high] - y[low]);
}

function hover(group, run, values) {
  const names = data.settings.filter((name) => value(group.settings, name) !== null);
  return [
    `<b>${escaped(group.label)}</b>`,
    ...(run ? [`seed ${escaped(text(run.seed))}, ${escaped(run.folder)}`] : []),
    ...values.map(([name, number]) => `${escaped(name)}: ${format(number)}`),
    ...names.map((name) => `<i>${escaped(name)}: ${escaped(text(value(group.settings, name)).slice(0, 60))}</i>`),
  ].join("<br>");
}

function plot(id, traces, [xTitle, xLog], [yTitle, yLog]) {
  const axis = (title, log) => ({
    title: { text: escaped(title ?? ""), standoff: 10 }, type: log ? "log" : "linear", automargin: true, gridcolor: "#e8ebee",
    zeroline: false, exponentformat: "power",
  });
  const layout = {
    xaxis: axis(xTitle, xLog), yaxis: axis(yTitle, yLog), hovermode: "closest", margin: { t: 10, r: 10, l: 50, b: 40 },
    legend: { orientation: "h", y: -0.18, yanchor: "top", font: { size: 11 } }, showlegend: true, font: { size: 12 },
    hoverlabel: { align: "left", bgcolor: "white", font: { size: 12 } },
    annotations: traces.length ? [] : [{ text: "nothing to show", showarrow: false, xref: "paper", yref: "paper" }],
  };
  Plotly.react(id, traces, layout, {
    responsive: true, displaylogo: false, toImageButtonOptions: { format: "svg", filename: id.replace("_plot", "") },
    // Named one by one, as plotly.js also has a button that sends the data to its cloud.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], plotlyServerURL: "",
  });
}

const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;

function deviation(values) {
  const middle = mean(values);
  return Math.sqrt(values.reduce((sum, one) => sum + (one - middle) ** 2, 0) / (values.length - 1));
}

// Floats as the report has them: four significant digits, no decimals from 1000 on.
function format(number, digits = 4) {
  if (typeof number !== "number" || Number.isInteger(number)) return String(number);
  return Math.abs(number) >= 1000 ? number.toFixed(0) : String(Number(number.toPrecision(digits)));
}

function cell(group, name) {
  const values = group.members.map((run) => value(run.metrics, name)).filter((one) => one !== null);
  if (!values.length) return { sort: null, text: "" };
  let shown = format(mean(values));
  if (values.length > 1 && !name.startsWith("paper: ")) shown += ` ± ${format(deviation(values), 2)}`;
  if (values.length < group.members.length && !name.startsWith("paper: ")) shown += ` (${values.length} of ${group.members.length})`;
  return { sort: mean(values), text: shown };
}

function columns(groups) {
  const setting = (name) => ({ name, of: (group) => {
    const one = value(group.settings, name);
    return { sort: one, text: one === null ? "" : format(one) };
  } });
  const plain = (name) => ({ name, of: (group) => ({ sort: group[name], text: group[name] }) });
  const differ = ({ of }) => distinct(groups.map((group) => of(group).text)).length > 1;
  return [
    plain("model"),
    ...[plain("task"), ...data.settings.map(setting)].filter(differ),
    { name: "seeds", of: ({ members }) => ({ sort: members.length, text: String(members.length) }) },
    ...[...data.results, ...data.costs].map((name) => ({ name, of: (group) => cell(group, name) }))
      .filter(({ of }) => groups.some((group) => of(group).text)),
  ];
}

function drawTable(groups) {
  const shown = columns(groups);
  const sorted = shown.find(({ name }) => name === view.sort);
  const sign = view.order ? -1 : 1;
  const rows = sorted ? [...groups].sort((a, b) => {
    const [first, second] = [sorted.of(a).sort, sorted.of(b).sort];
    return first === null || second === null ? compare(first, second) : sign * compare(first, second);
  }) : groups;
  const numeric = (column) => groups.every((group) => ["number", "object"].includes(typeof column.of(group).sort));
  const notes = distinct(groups.flatMap((group) => group.notes));
  const head = element("tr");
  head.append(...shown.map((column) => {
    const arrow = column === sorted ? (view.order ? " ▼" : " ▲") : "";
    const heading = element("th", column.name.replaceAll(/[/.]/g, "$&\u200b") + arrow, numeric(column) ? "number" : "");
    heading.onclick = () => {
      view.order = view.sort === column.name && !view.order ? "descending" : "";
      view.sort = column.name;
      update();
    };
    return heading;
  }));
  document.querySelector("thead").replaceChildren(head);
  document.querySelector("tbody").replaceChildren(...rows.map((group) => {
    const row = element("tr");
    row.append(...shown.map((column) => element("td", column.of(group).text, numeric(column) ? "number" : "")));
    const { color, dash } = style(group);
    const swatch = element("span", "", "swatch");
    swatch.style.borderTop = `3px ${{ solid: "solid", dash: "dashed", dot: "dotted" }[dash]} ${color}`;
    row.firstChild.prepend(swatch);
    row.firstChild.append(...group.notes.map((note) => ` [${notes.indexOf(note) + 1}]`));
    return row;
  }));
  byId("notes").replaceChildren(...notes.map((note) => element("li", note)));
}

for (const name of Object.keys(DEFAULTS)) {
  const input = byId(name);
  if (!input) continue;
  input.oninput = () => {
    view[name] = input.type === "checkbox" ? (input.checked ? "1" : "") : input.value;
    update();
  };
}

function start() {
  readAddress();
  for (const name of Object.keys(DEFAULTS)) {
    const input = byId(name);
    if (input?.type === "checkbox") input.checked = Boolean(view[name]);
    if (input?.type === "range") input.value = view[name];
  }
  draw();
}

byId("reset").onclick = () => {
  history.replaceState(null, "", "#");
  start();
};
byId("problems").hidden = !data.problems.length;
byId("problems").querySelector("ul").append(
  ...data.problems.map(({ folder, problem }) => element("li", `${folder}: ${problem}`)),
);
window.addEventListener("hashchange", start);
start();
