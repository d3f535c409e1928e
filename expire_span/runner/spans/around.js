// What stands above and below the text: facts, tables, curves.

function head() {
  const facts = make("dl");
  for (const [name, value] of Object.entries(data.facts))
    facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  const parts = [make("h1", {}, document.title), facts];
  data.texts.forEach((text, index) => {
    const name = index ? "With the replacement" : `Text: ${data.source}`;
    const of = data.length > text.tokens.length && !index ? ` of ${number(data.length, 0)}` : "";
    const seen = layers.map(layer => number(text.memory[`memory/size_layer_${layer}`])).join(", ");
    const held = layers.map(layer => number(text.memory[`memory/held_layer_${layer}`])).join(", ");
    const results = Object.entries(text.result).map(([metric, value]) => `${number(value, 3)} ${metric}`);
    const sizes = [`${number(text.tokens.length, 0)}${of} ${data.unit}s`, ...results].join(", ");
    const memories = `memories that a query sees, by layer: ${seen}; that a layer holds: ${held}`;
    parts.push(make("p", {}, make("b", {}, name), `: ${sizes}; ${memories}.`));
  });
  const isConstant = data.texts[0].spans.flat().every(head => !Array.isArray(head));
  if (isConstant)
    parts.push(
      make(
        "p",
        {},
        "The spans of this model do not depend on the text: " +
          layers
            .map(
              layer =>
                `layer ${layer} ${[...new Set(data.texts[0].spans[layer].map(head => number(head)))].join(", ")}`,
            )
            .join("; ") +
          ".",
      ),
    );
  byId("head").replaceChildren(...parts);
}
function groupTable(rows, label) {
  const bits = rows.some(row => row.bits[0] != null),
    more = rows.some(row => row.bits[1] != null);
  const header = [
    label,
    "number",
    ...layers.map(layer => `layer ${layer}`),
    ...(bits ? ["loss, bits"] : []),
    ...(more ? [`with spans ≤ ${data.span_cap}`] : []),
  ];
  const table = make("table", {}, make("tr", {}, ...header.map(name => make("th", { scope: "col" }, name))));
  for (const row of rows) {
    const line = make("tr", {}, make("td", {}, row.name), make("td", {}, number(row.count, 0)));
    row.spans.forEach((value, layer) => {
      const box = make("td", {}, number(value));
      fill(box, colors().spans, share(value, range(layer)));
      line.append(box);
    });
    if (bits) line.append(make("td", {}, number(row.bits[0], 2)));
    if (more) line.append(make("td", {}, signed(row.bits[1], 3)));
    table.append(line);
  }
  return make("div", { class: "wide" }, table);
}
function tables() {
  const parts = [
    make("h2", {}, "Mean span by kind, in timesteps"),
    groupTable(
      data.texts[0].groups.filter(row => row.name !== "replaced"),
      "kind",
    ),
  ];
  if (data.texts.length > 1) {
    const rows = data.texts.flatMap((text, index) =>
      text.groups
        .filter(row => row.name === "replaced")
        .map(row => ({ ...row, name: data.replacements.map(pair => pair[index] || "(nothing)").join(", ") })),
    );
    parts.push(make("h2", {}, "What was replaced, and by what"), groupTable(rows, "text"));
  }
  byId("tables").replaceChildren(...parts);
}
function curves() {
  if (!data.curves) return;
  const { size, count, runs, excerpts } = data.curves,
    width = 1000,
    height = 280,
    left = 44,
    right = 12,
    top = 12,
    bottom = 30;
  const strokes = dark.matches
    ? ["#78b7ee", "#f0a35e", "#8fd19e", "#e58bb6"]
    : ["#0b61a4", "#c2571a", "#2f7d46", "#a8326c"];
  const highest = Math.max(0.1, ...runs.flatMap(run => run.bits.filter(value => value != null)));
  const x = part => left + ((width - left - right) * Math.min(count, (part + 0.5) * size)) / count,
    y = value => top + (height - top - bottom) * (1 - value / highest);
  const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Loss along the data" });
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5].find(step => highest / step <= 6) ?? 10;
  for (let value = 0; value <= highest; value += step)
    chart.append(
      make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      make("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, step < 0.1 ? 2 : 1)),
    );
  for (let part = 0; part <= 4; part++)
    chart.append(
      make(
        "text",
        {
          x: left + ((width - left - right) * part) / 4,
          y: height - 10,
          "text-anchor": part === 4 ? "end" : "middle",
        },
        number((count * part) / 4, 0),
      ),
    );
  runs.forEach((run, index) =>
    chart.append(
      make("polyline", {
        fill: "none",
        stroke: strokes[index % 4],
        "stroke-width": 1.6,
        "stroke-dasharray": index > 3 ? "5 3" : null,
        points: run.bits.map((value, part) => (value == null ? "" : `${x(part)},${y(value)}`)).join(" "),
      }),
    ),
  );
  const guide = make("line", { class: "grid", y1: top, y2: height - bottom, x1: -9, x2: -9 });
  chart.append(guide);
  const readout = make("p", { class: "soft" }, "Hover over the curve for its numbers and the text there.");
  chart.addEventListener("mousemove", event => {
    const box = chart.getBoundingClientRect(),
      place = ((event.clientX - box.left) / box.width) * width;
    const part = Math.max(
      0,
      Math.min(excerpts.length - 1, Math.floor((((place - left) / (width - left - right)) * count) / size)),
    );
    guide.setAttribute("x1", x(part));
    guide.setAttribute("x2", x(part));
    const losses = runs.map(run => `${run.name} ${number(run.bits[part], 2)}`).join(", ");
    readout.replaceChildren(
      `from ${data.unit} ${number(part * size, 0)}: ${losses}. `,
      make("code", {}, visible(excerpts[part])),
    );
  });
  const names = make("p");
  runs.forEach((run, index) => {
    const name = make("b", {}, `— ${run.name}  `);
    name.style.color = strokes[index % 4];
    names.append(name);
  });
  byId("curves").replaceChildren(
    make("h2", {}, `Loss along the data, in bits per ${data.unit}, means of ${number(size, 0)} ${data.unit}s`),
    names,
    chart,
    readout,
  );
}
function foot() {
  const hasPooled = data.texts.some(text => text.pooled.some(rows => rows.length));
  const reading = [
    `Each ${data.unit} becomes a memory of each layer, whose span says for how many timesteps it has full weight.`,
    "Then it fades over the ramp R and is deleted.",
    ...(hasPooled ? ["A mean of several older memories counts as one, and all of its text is colored."] : []),
    "Where heads have different spans, colors show their mean.",
    "· is a space, ⏎ a line break" + (data.unit === "byte" ? ", ◂ a byte of a character that goes on." : "."),
    `The loss of a ${data.unit} is what predicting it cost, after all that was read before.`,
  ];
  const figures =
    "Figures 9 and 12 of the paper are the colored text, 10 the loss with capped spans, 13 the loss along the data.";
  byId("foot").replaceChildren(
    make("h2", {}, "How to read this"),
    make("p", {}, reading.join(" ")),
    make("p", {}, figures),
    make("p", {}, make("code", {}, data.command)),
  );
}
