// The colored text, and what the reader does with it.

function paint() {
  data.texts.forEach((text, which) => {
    const moment = state.moment?.[which] ?? null,
      { spans, changes } = colors();
    const living = moment == null ? null : layers.map(layer => alive(text, layer, moment));
    cells[which].forEach((elements, index) =>
      elements.forEach(({ element, layer }) => {
        element.className = "c";
        if (data.slots && !kept[which].has(index)) element.classList.add("changed");
        clear(element);
        if (living) {
          const m = living[layer].masks[index] ?? 0;
          if (index === moment) element.classList.add("now");
          else if (index > moment) element.classList.add("later");
          else if (m > 0) fill(element, spans, maskShare(m));
          else element.classList.add("gone");
        } else if (state.by === "span") fill(element, spans, share(span(text, layer, index), range(layer)));
        else if (state.by === "bits" && text.bits[index] != null) fill(element, spans, text.bits[index] / maxBits);
        else if (state.by === "more_bits" && text.more_bits[index] != null)
          fill(element, changes, 0.5 + text.more_bits[index] / maxChange / 2);
      }),
    );
  });
  legend();
  showMoment();
  tables();
}

function ticks(limits) {
  const [low, high] = limits;
  if (!state.log) return [0, 1, 2, 3, 4].map(part => low + (part * (high - low)) / 4);
  const round = [1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5].filter(
    value => share(value, limits) > 0.09 && share(value, limits) < 0.9,
  );
  return [low, ...round, high];
}
function legend() {
  const { spans, changes } = colors();
  let scale = spans,
    labels,
    title;
  const quarters = [0, 0.25, 0.5, 0.75, 1];
  if (state.moment) {
    title = "soft mask m at that moment";
    labels = quarters.map(m => [m, m === 0 ? "gone" : String(m)]);
    scale = quarters.map(m => spans[Math.round(maskShare(m) * (spans.length - 1))]);
  } else if (state.by === "span") {
    title = "span in timesteps" + (state.own && state.layer < 0 ? ", of layer 0" : "");
    const limits = range(Math.max(0, state.layer));
    labels = ticks(limits).map(value => [share(value, limits), number(value, limits[1] < 20 ? 1 : 0)]);
  } else if (state.by === "bits") {
    title = "loss in bits";
    labels = quarters.map(part => [part, number(part * maxBits)]);
  } else {
    title = `bits more with spans of at most ${number(data.span_cap, 0)}`;
    labels = quarters.map(part => [part, signed((2 * part - 1) * maxChange, 2)]);
    scale = changes;
  }
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
function showMoment() {
  const line = byId("moment");
  if (!state.moment)
    return line.replaceChildren(
      `Click a ${data.unit} to see which memories are still alive when it is read. ` +
        "Hover for numbers; with the keyboard: Tab, arrows, Enter, Escape.",
    );
  const parts = data.texts.map((text, place) => {
    const moment = state.moment[place];
    const counts = layers
      .map(layer => `layer ${layer} still has ${number(alive(text, layer, moment).count, 0)}`)
      .join(", ");
    const start = data.texts.length > 1 ? `${["before", "after"][place]}: when` : "When";
    return `${start} ${data.unit} ${number(moment, 0)} (${label(place, moment)}) is read, ${counts}`;
  });
  const back = make("button", { type: "button" }, "back to spans");
  back.onclick = () => choose(null);
  line.replaceChildren(`${parts.join("; ")} memories. `, back);
}

// The text
const showsLayers = () => state.by === "span" || state.moment !== null;
function cell(which, index, layer) {
  const element = make("span", { class: "c" }, label(which, index));
  element.place = [which, index];
  cells[which][index].push({ element, layer });
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
function flow(box) {
  // one layer, in the lines of the text
  data.texts[0].tokens.forEach((token, index) => {
    box.append(cell(0, index, Math.max(0, state.layer)));
    if (token.includes("\n")) box.append(make("br"));
    else if (data.unit === "word") box.append(" ");
    else if (token === " ") box.append(make("wbr"));
  });
}
const label = (which, index) => visible(shownAs(data.texts[which].tokens[index]));
const gap = data.unit === "word" ? " " : "";
const slotText = (slot, which) => {
  let text = "";
  for (let index = slot[2 * which]; index < slot[2 * which + 1]; index++) text += label(which, index) + gap;
  return text;
};
const slotWidth = slot => Math.max(...data.texts.map((_, which) => [...slotText(slot, which)].length));
function stack(box) {
  // layers, and the text before and after a replacement, one above the other
  const probe = make("span", {}, "0".repeat(50));
  box.append(probe);
  const columns = Math.max(20, Math.floor((box.clientWidth - 140) / (probe.getBoundingClientRect().width / 50)));
  probe.remove();
  const shown = !showsLayers() ? [0] : state.layer < 0 ? layers : [state.layer];
  for (let start = 0; start < slots.length;) {
    let end = start,
      width = 0,
      afterSpace = 0;
    for (; end < slots.length; end++) {
      width += slotWidth(slots[end]);
      if (width > columns && end > start) {
        end = afterSpace || end;
        break;
      }
      if (/\s$/.test(data.texts[0].tokens[slots[end][1] - 1])) afterSpace = end + 1;
    }
    const rows = make("div", { class: "rows" });
    for (const layer of shown)
      data.texts.forEach((_, which) => {
        const name = [
          ...(showsLayers() ? [`layer ${layer}`] : []),
          ...(data.texts.length > 1 ? [["before", "after"][which]] : []),
        ].join(" ");
        const line = make("span");
        for (const slot of slots.slice(start, end)) {
          for (let index = slot[2 * which]; index < slot[2 * which + 1]; index++)
            line.append(cell(which, index, layer), gap);
          line.append(" ".repeat(slotWidth(slot) - [...slotText(slot, which)].length));
        }
        rows.append(make("div", {}, make("i", {}, name), line));
      });
    box.append(rows);
    start = end;
  }
}

// What the reader does
const counterpart = (which, index) => kept[which].get(index) ?? null; // the same token in the other text
function choose(place) {
  const before = showsLayers();
  if (place === null || state.moment?.[place[0]] === place[1]) {
    state.moment = null;
    history.replaceState(null, "", "#");
  } else {
    const [which, index] = place,
      moment = [index];
    if (data.texts.length > 1) {
      let other = null;
      for (let from = index; other === null && from < data.texts[which].tokens.length; from++)
        other = counterpart(which, from);
      moment[which] = index;
      moment[1 - which] = other ?? data.texts[1 - which].tokens.length - 1;
    }
    state.moment = moment;
    history.replaceState(null, "", `#${moment[0]}`); // the address shows this moment again
  }
  showsLayers() === before ? paint() : render();
}
function showTip(place, box) {
  const tip = byId("tip"),
    [which, index] = place,
    text = data.texts[which],
    moment = state.moment?.[which];
  const other = counterpart(which, index),
    table = make("table");
  const row = (...values) => table.append(make("tr", {}, ...values.map(value => make("td", {}, value))));
  const before = moment != null && index < moment;
  row("", "span", ...(other !== null ? [which ? "before" : "after"] : []), ...(before ? ["m"] : []));
  for (const layer of layers) {
    const values = heads(text, layer, index);
    const range =
      Math.max(...values) - Math.min(...values) > 0.05
        ? ` (heads ${number(Math.min(...values))} to ${number(Math.max(...values))})`
        : "";
    row(
      `layer ${layer}`,
      number(span(text, layer, index)) + range,
      ...(other !== null ? [number(span(data.texts[1 - which], layer, other))] : []),
      ...(before ? [number(alive(text, layer, moment).masks[index] ?? 0, 2)] : []),
    );
  }
  const lines = [
    make(
      "div",
      {},
      make("b", {}, visible(shownAs(text.tokens[index]))),
      ` ${data.unit} ${index}` + (before ? `, ${moment - index} timesteps before the moment` : ""),
    ),
    table,
  ];
  if (text.bits[index] != null)
    lines.push(
      make(
        "div",
        {},
        `loss ${number(text.bits[index], 2)} bits` +
          (text.more_bits?.[index] != null
            ? `, with spans of at most ${data.span_cap}: ${signed(text.more_bits[index], 2)}`
            : ""),
      ),
    );
  tip.replaceChildren(...lines);
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(innerWidth - width - 8, box.left))}px`;
  tip.style.top = `${box.bottom + height + 12 < innerHeight ? box.bottom + 6 : Math.max(4, box.top - height - 6)}px`;
}
const hide = () => {
  byId("tip").style.display = "none";
};
byId("main").addEventListener("mouseover", event =>
  event.target.place ? showTip(event.target.place, event.target.getBoundingClientRect()) : hide(),
);
byId("main").addEventListener("mouseleave", hide);
byId("main").addEventListener("click", event => {
  if (event.target.place) choose(event.target.place);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") {
    hide();
    if (state.moment) choose(null);
  }
});
byId("main").addEventListener("keydown", event => {
  const [which, at] = state.at ?? [0, -1],
    last = data.texts[which].tokens.length - 1;
  const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last };
  if (event.key in steps) move(which, Math.max(0, Math.min(last, steps[event.key])));
  else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && data.texts.length > 1 && at >= 0) {
    const other = event.key === "ArrowUp" ? 0 : 1;
    if (other !== which) move(other, counterpart(which, at) ?? 0);
  } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
    choose([which, at]);
    move(which, at);
  } else return;
  event.preventDefault();
});
function move(which, index) {
  const before = state.at && cells[state.at[0]][state.at[1]];
  before?.forEach(({ element }) => element.classList.remove("at"));
  state.at = [which, index];
  const elements = cells[which][index];
  elements.forEach(({ element }) => element.classList.add("at"));
  elements[0].element.scrollIntoView({ block: "nearest" });
  showTip(state.at, elements[elements.length - 1].element.getBoundingClientRect());
}

function tools() {
  const tabs = make("div", { role: "tablist", "aria-label": "Layer" });
  const choices = [
    ...(layers.length > 1 ? [[-1, "all layers"]] : []),
    ...layers.map(layer => [layer, `layer ${layer}`]),
  ];
  choices.forEach(([layer, name], place) => {
    const tab = make(
      "button",
      {
        type: "button",
        role: "tab",
        "aria-selected": layer === state.layer,
        tabindex: layer === state.layer ? 0 : -1,
      },
      name,
    );
    tab.onclick = () => {
      state.layer = layer;
      update();
      render();
    };
    tab.onkeydown = event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) {
        const next = tabs.children[(place + step + choices.length) % choices.length];
        next.focus();
        next.click();
      }
    };
    tabs.append(tab);
  });
  const update = () =>
    [...tabs.children].forEach((tab, place) => {
      tab.setAttribute("aria-selected", choices[place][0] === state.layer);
      tab.tabIndex = choices[place][0] === state.layer ? 0 : -1;
    });
  const option = (value, name) => make("option", { value }, name);
  const by = make(
    "select",
    { "aria-label": "Color by" },
    option("span", "span"),
    ...(known("bits").length ? [option("bits", "loss")] : []),
    ...(known("more_bits").length ? [option("more_bits", "loss with capped spans")] : []),
  );
  by.onchange = () => {
    state.by = by.value;
    state.moment = null;
    render();
  };
  const scale = make(
    "select",
    { "aria-label": "Scale of the spans" },
    option("log", "logarithmic"),
    option("linear", "linear"),
  );
  scale.onchange = () => {
    state.log = scale.value === "log";
    paint();
  };
  const own = make("input", { type: "checkbox" });
  own.onchange = () => {
    state.own = own.checked;
    paint();
  };
  byId("tools").replaceChildren(
    tabs,
    make("label", {}, "color by ", by),
    make("label", {}, "scale ", scale),
    ...(layers.length > 1 ? [make("label", {}, own, " each layer its own")] : []),
    make("div", { id: "legend" }),
  );
}

const start = () => {
  head();
  tools();
  render();
  curves();
  foot();
};
addEventListener("resize", () => {
  clearTimeout(state.timer);
  state.timer = setTimeout(render, 200);
});
dark.addEventListener("change", () => {
  paint();
  curves();
});
start();
const linked = Number(location.hash.slice(1) || "x");
if (Number.isInteger(linked) && linked >= 0 && linked < data.texts[0].tokens.length) choose([0, linked]);
