"""Pictures of the paper's tables and figures."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .paper_tables import Line, Table, head, measured, scaled

COLORS = ("#cf4457", "#2c6a82", "#d99a2b", "#6b6b6b")


def draw(table: Table, size: str, lines: Sequence[Line], paths: Sequence[Path]) -> None:
    """A picture of the first metric: bars, or points against another metric."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "expire-span"  # and no date: the same runs give the same file
    import matplotlib.pyplot as plt

    shown = [line for line in lines if table.metrics[0] in line.row.paper or not line.row.paper]
    height = 4.0 if table.against else 0.9 + 0.45 * len(shown)
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    (draw_against if table.against else draw_bars)(axis, table, size, shown)
    axis.set_title(table.title)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def draw_bars(axis: Any, table: Table, size: str, lines: Sequence[Line]) -> None:
    """A bar for each row: the paper's number, each seed, and their mean."""
    metric = table.metrics[0]
    for place, line in enumerate(lines):
        paper, ours = scaled(metric, line.row.paper.get(metric, math.nan)), scaled(metric, measured(metric, line.runs))
        labels = ("the paper", f"{size}, each seed", f"{size}, mean") if place == 0 else (None,) * 3
        axis.plot(paper, place, "D", color="gray", label=labels[0])
        axis.plot(ours, [place] * len(ours), "o", markersize=4, color=COLORS[0], label=labels[1])
        axis.barh(place, ours.mean(), height=0.5, color=COLORS[0], alpha=0.35, label=labels[2])
    axis.set_yticks(range(len(lines)), [line.row.title for line in lines])
    axis.set_xlabel(head(metric))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)


def draw_against(axis: Any, table: Table, size: str, lines: Sequence[Line]) -> None:
    """A curve for each model: every seed a point, and a line through the rows' means over seeds."""
    metric = table.metrics[0]
    models: dict[str, list[pd.DataFrame]] = {}
    for line in lines:
        points = {"x": measured(table.against, line.runs), "y": scaled(metric, measured(metric, line.runs))}
        if all(len(values) for values in points.values()):
            models.setdefault(line.runs["model"].iloc[0], []).append(pd.DataFrame(points))
    for color, (model, rows) in zip(itertools.cycle(COLORS), models.items(), strict=False):
        means = pd.DataFrame([row.mean() for row in rows]).sort_values("x")
        axis.plot(means["x"], means["y"], color=color)
        every = pd.concat(rows)
        axis.plot(every["x"], every["y"], "o", markersize=5, color=color, alpha=0.6, label=f"{model}, each seed")
    axis.set(xlabel=f"{head(table.against)}, {size}", ylabel=head(metric))
    axis.grid(alpha=0.3)
