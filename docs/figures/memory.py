"""Draw memory.svg: the soft mask of one memory over distance, and when a layer deletes its memories."""

from pathlib import Path

import matplotlib
import torch

from expire_span.attention import soft_mask

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "expire-span",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
import matplotlib.pyplot as plt  # noqa: E402

BLOCK, RAMP, MADE, SPAN = 64, 64, 24, 118  # timesteps
MEMORIES = [  # (word, made at, span)
    ("the", 6, 4),
    ("butler", MADE, SPAN),
    ("walks", 50, 22),
    (".", 75, 2),
    ("kitchen", 98, 150),
]
RED, BLUE, GRAY = "#d1495b", "#2b6777", "#8d99ae"


def main() -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8.6, 5.4), sharex=True, layout="constrained")
    figure.get_layout_engine().set(hspace=0.06)
    for axes in (top, bottom):
        for number in range(6):
            axes.axvspan(number * BLOCK, (number + 1) * BLOCK, color="#f1f4f7" if number % 2 else "white", zorder=0)

    time = torch.arange(MADE + 1, deletion(MADE, SPAN) + 1)
    m = soft_mask(time - MADE, torch.tensor(float(SPAN)), RAMP)
    top.plot(time, m, color=RED, linewidth=2)
    top.fill_between(time, m, color=RED, alpha=0.12, linewidth=0)
    top.set(ylim=(-0.04, 1.45), ylabel="m, weight of the memory", yticks=[0, 0.5, 1])
    top.set_title(
        "One memory, made at timestep i: full weight for its span e, then fading over the ramp R",
        fontsize=10,
        loc="left",
    )
    for start, end, label in ((MADE, MADE + SPAN, "span  e = 118"), (MADE + SPAN, MADE + SPAN + RAMP, "ramp  R = 64")):
        top.annotate(
            "", (start, 1.1), (end, 1.1), arrowprops={"arrowstyle": "<->", "color": BLUE, "shrinkA": 0, "shrinkB": 0}
        )
        top.text((start + end) / 2, 1.14, label, ha="center", color=BLUE)
    deleted = deletion(MADE, SPAN)
    top.plot(deleted, 0, "X", color="black", markersize=9, clip_on=False, zorder=5)
    top.annotate(
        "deleted: m is 0 for the\nfirst query of this block",
        (deleted, 0.02),
        (deleted + 10, 0.42),
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": "black"},
    )

    for row, (_, made, span) in enumerate(reversed(MEMORIES)):
        end = deletion(made, span)
        times = torch.arange(made, end + 1)
        weight = soft_mask(times - made, torch.tensor(float(span)), RAMP)
        bottom.fill_between(
            times, row - 0.28 * weight, row + 0.28 * weight, color=RED, linewidth=0, alpha=0.75, zorder=2
        )
        bottom.plot([made, min(end, 5 * BLOCK)], [row, row], color=GRAY, linewidth=1, zorder=1)
        if end <= 5 * BLOCK:
            bottom.plot(end, row, "X", color="black", markersize=7, clip_on=False, zorder=5)
    bottom.set_yticks(range(len(MEMORIES)), [word for word, *_ in reversed(MEMORIES)])
    bottom.set_title(
        "Memories of one layer: width is m, a cross is the deletion, always between two blocks", fontsize=10, loc="left"
    )
    bottom.set(xlabel="timestep t of the query", xlim=(0, 5 * BLOCK), ylim=(-0.6, len(MEMORIES) - 0.2))
    bottom.set_xticks([number * BLOCK for number in range(6)])
    for number in range(5):
        bottom.text((number + 0.5) * BLOCK, -0.52, f"block {number}", ha="center", color=GRAY, fontsize=9)
    figure.savefig(Path(__file__).with_name("memory.svg"), facecolor="white", metadata={"Date": None})


def deletion(made: int, span: int) -> int:
    """The first timestep of the first block, after the memory's own, whose first query sees m = 0."""
    first = (made // BLOCK + 1) * BLOCK
    while soft_mask(torch.tensor(first - made), torch.tensor(float(span)), RAMP) > 0:
        first += BLOCK
    return first


if __name__ == "__main__":
    main()
