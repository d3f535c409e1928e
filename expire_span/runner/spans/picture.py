"""The picture that `expire-span-spans` writes: the beginning of the page, for papers and slides. Needs matplotlib."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import CenteredNorm, ListedColormap, LogNorm

from .page import change_colors, span_colors

COLUMNS, MAX_ROWS = 100, 36  # characters of a line; rows of all lines together
BEFORE = 50  # tokens that are shown before the first one that is replaced
VISIBLE = {" ": "·", "\n": "⏎", "\t": "→", "": "◂"}
BAR: dict[str, Any] = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.01}


class Row(NamedTuple):
    """One way to color one of the texts."""

    name: str
    number: int  # of the text
    colors: np.ndarray  # (tokens, 4), red, green, blue and opacity; 0 of that where there is no value


def draw_spans(data: dict[str, Any], path: Path) -> None:
    """Draw the spans of each layer over the text, before and after a replacement, and the loss along the data."""
    spans, changes = span_scale(data), change_scale(data)
    rows = make_rows(data, spans, changes)
    slots = data["slots"] or [(place, place + 1) for place in range(len(data["texts"][0]["tokens"]))]
    first = max(0, next((place for place, slot in enumerate(slots) if slot[-1] is True), 0) - BEFORE)
    lines = break_lines(data, slots[first:])[: max(1, MAX_ROWS // len(rows))]
    heights = [0.22 * len(lines) * (len(rows) + 0.7) + 0.3, *([2.4] if data["curves"] else [])]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(12, sum(heights) + 1.2), height_ratios=heights, squeeze=False, layout="constrained"
    )
    draw_text(axes[0, 0], data, rows, lines)
    pairs = [(old or "nothing", new or "nothing") for old, new in data["replacements"]]
    change = "".join(f", and with {old} → {new}" for old, new in pairs)
    title = f"What the run {data['run']} remembers of {data['source']}{change}"
    axes[0, 0].set_title(title, loc="left", fontsize=10, parse_math=False)
    figure.colorbar(spans, ax=axes[0, 0], label="span, timesteps (log)", **BAR)
    if changes:
        label = f"loss, bits more with spans of at most {data['span_cap']}"
        figure.colorbar(changes, ax=axes[0, 0], label=label, **BAR)
    if data["curves"]:
        draw_curves(axes[1, 0], data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks becomes a box
        figure.savefig(path, dpi=110)
    plt.close(figure)


def span_scale(data: dict[str, Any]) -> ScalarMappable:
    """Logarithmic, from the smallest to the largest span of all texts and layers."""
    layers = range(len(data["layers"]))
    spans = np.concatenate([mean_over_heads(text, layer) for text in data["texts"] for layer in layers])
    low = max(1.0, spans.min())
    return ScalarMappable(LogNorm(low, max(2.0, 1.01 * low, spans.max()), clip=True), ListedColormap(span_colors()))


def change_scale(data: dict[str, Any]) -> ScalarMappable | None:
    """From a lower loss with capped spans to a higher one; the largest hundredth is cut off. None without a cap."""
    if data["span_cap"] is None:
        return None
    sizes = np.abs(np.concatenate([np.array(text["more_bits"], float) for text in data["texts"]]))
    limit = max(0.1, np.quantile(sizes[~np.isnan(sizes)], 0.99)) if (~np.isnan(sizes)).any() else 0.1
    return ScalarMappable(CenteredNorm(0, limit, clip=True), ListedColormap(change_colors()))


def make_rows(data: dict[str, Any], spans: ScalarMappable, changes: ScalarMappable | None) -> list[Row]:
    """A row for each layer, and one for the loss with capped spans; of both texts, one above the other."""
    texts = list(zip([""] if len(data["texts"]) == 1 else [" before", " after"], data["texts"], strict=True))
    rows = [
        Row(f"layer {layer}{suffix}", number, spans.to_rgba(mean_over_heads(text, layer)))
        for layer in range(len(data["layers"]))
        for number, (suffix, text) in enumerate(texts)
    ]
    if changes:
        for number, (suffix, text) in enumerate(texts):
            colors = changes.to_rgba(np.ma.masked_invalid(np.array(text["more_bits"], float)))
            rows.append(Row(f"spans ≤ {data['span_cap']}{suffix}", number, colors))
    return rows


def mean_over_heads(text: dict[str, Any], layer: int) -> np.ndarray:
    """The span of each token in a layer, (time,)."""
    return np.mean([np.broadcast_to(head, len(text["tokens"])) for head in text["spans"][layer]], 0)


def label_of(token: str) -> str:
    """What is drawn for a token; a word is followed by a gap."""
    if not token:
        return VISIBLE[""]
    is_word = len(token) > 1 and token.endswith(" ")
    text = token[:-1] if is_word else token
    return "".join(VISIBLE.get(c, c if c.isprintable() else "□") for c in text) + " " * is_word


def labels_in(data: dict[str, Any], slot: Sequence[int], number: int) -> list[str]:
    return [label_of(token) for token in data["texts"][number]["tokens"][slice(*slot[2 * number : 2 * number + 2])]]


def width_of(data: dict[str, Any], slot: Sequence[int]) -> int:
    return max(sum(map(len, labels_in(data, slot, number))) for number in range(len(data["texts"])))


def break_lines(data: dict[str, Any], slots: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Lines of at most COLUMNS characters."""
    lines: list[list[Sequence[int]]] = [[]]
    used = 0
    for slot in slots:
        width = width_of(data, slot)
        if lines[-1] and used + width > COLUMNS:
            lines.append([])
            used = 0
        lines[-1].append(slot)
        used += width
    return lines


def draw_text(axis: Any, data: dict[str, Any], rows: Sequence[Row], lines: Sequence[Sequence[Sequence[int]]]) -> None:
    """The rows of each line, one above the other: a colored box for each token, and its characters."""
    boxes, colors, top = [], [], 0.0
    for line in lines:
        for row in rows:
            axis.text(-0.8, top + 0.5, row.name, ha="right", va="center", fontsize=7, color="#6d675e")
            column = 0
            for slot in line:
                place = column
                for index, label in enumerate(labels_in(data, slot, row.number), start=slot[2 * row.number]):
                    end = place + len(label.rstrip())
                    boxes.append([(place, top), (end, top), (end, top + 1), (place, top + 1)])
                    colors.append(row.colors[index])
                    draw_characters(axis, place, top, label, row.colors[index])
                    place += len(label)
                column += width_of(data, slot)
            top += 1
        top += 0.7
    axis.add_collection(PolyCollection(boxes, facecolors=colors, linewidths=0), autolim=False)
    axis.set(xlim=(-13, COLUMNS), ylim=(top, 0))
    axis.axis("off")


def draw_characters(axis: Any, column: int, top: float, label: str, color: np.ndarray) -> None:
    """A character in each column, dark or light, as its background asks for."""
    is_dark = color[3] > 0 and color[:3] @ (0.299, 0.587, 0.114) < 0.55
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "family": "monospace"}
    ink = "white" if is_dark else "#22201c"
    for offset, character in enumerate(label.rstrip()):  # in_layout would measure every character once more
        axis.text(column + offset + 0.5, top + 0.54, character, color=ink, in_layout=False, parse_math=False, **style)


def draw_curves(axis: Any, data: dict[str, Any]) -> None:
    """The loss of each run along the data (figure 13)."""
    curves = data["curves"]
    for run in curves["runs"]:
        places = [(window + 0.5) * curves["size"] for window in range(len(run["bits"]))]
        bits = [math.nan if value is None else value for value in run["bits"]]
        axis.plot(places, bits, linewidth=1.2, label=run["name"])
    axis.set(xlabel=f"{data['unit']}s", ylabel=f"loss, bits per {data['unit']}", xlim=(0, curves["count"]))
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
