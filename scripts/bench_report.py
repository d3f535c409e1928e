"""The table, the ratios and the figure of what `bench_step` has measured."""

from pathlib import Path
from typing import Any

FUSED = ("fused", "compiled")
COLUMNS = ["model", "variant", "span", "memories", "ms (quartiles)", "tokens/s", "saved MB", "peak MB", "GFLOP/s",
           "of a large matmul's", "x roofline"]  # fmt: skip


def table_row(result: dict[str, Any]) -> str:
    low, high = result["ms_quartiles"]
    cells = [
        result.get("task") or result["model"],
        f"{result['variant']}, {result['backend']}" if result["variant"] in FUSED else result["variant"],
        f"{result['span']:,}",
        f"{result['num_memories']:.0f}",
        f"{result['ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{result['tokens_per_second']:.0f}",
        f"{result['saved_mb']:.1f}",
        f"{result['peak_mb']:.0f}",
        f"{result['gflops']:.0f}",
        f"{100 * result['gflops'] / result['machine_gflops']:.0f}%",
        f"{result['over_roofline']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def ratios(results: list[dict[str, Any]]) -> list[str]:
    """How many times less the fused variants take than the reference in the same run."""
    lines = []
    for fused in results:
        for reference in results:
            same_case = all(
                fused[key] == reference[key] for key in ("model", "span", "keep_prob", "batch_size", "hidden_size")
            )
            if fused["variant"] in FUSED and reference["variant"] == "reference" and same_case:
                case = f"{fused['model']}, {fused['variant']}, span {fused['span']:,}"
                memories = f"{fused['num_memories']:.0f} memories"
                time_ratio, saved_ratio, peak_ratio = (reference[key] / fused[key] for key in RATIO_KEYS)
                lines.append(
                    f"{case}, {memories}, {time_ratio:.2f} x less time, {saved_ratio:.2f} x fewer saved bytes, "
                    f"{peak_ratio:.2f} x less peak memory"
                )
    return lines


RATIO_KEYS = ("ms", "saved_mb", "peak_mb")
MODEL_NAMES = {
    "trans_xl": "Transformer-XL",
    "expire_span": "Expire-Span",
    "adaptive_span": "Adaptive-Span",
    "compressive": "Compressive",
}
VARIANTS = {
    "fused": "fused",
    "compiled": "fused and compiled",
    "reference": "plain reference",
    "sdpa": "torch's own attention, no positions",
    "flex": "flex_attention",
    "varlen": "varlen_attn, no positions",
}
LINE_STYLES = dict(zip(VARIANTS, ("-", "-.", ":", "--", (0, (3, 1, 1, 1)), (0, (1, 3))), strict=True))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time and bytes saved for the backward pass, against the span."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        is_expire_span = result["model"] == "expire_span"
        memories = f", about {round(result['num_memories'], -2):.0f} memories" if is_expire_span else ""
        label = f"{MODEL_NAMES[result['model']]}{memories}: {VARIANTS[result['variant']]}"
        curves.setdefault(label, []).append(result)
    for label, points in sorted(curves.items()):
        points.sort(key=lambda result: result["span"])
        spans = [result["span"] for result in points]
        color = "#d1495b" if label.startswith("Expire") else "#2b6777"
        style = {"color": color, "label": label, "linestyle": LINE_STYLES[points[0]["variant"]]}
        for axis, key in zip(axes, ("ms", "saved_mb"), strict=True):
            axis.plot(spans, [result[key] for result in points], marker="o", markersize=3, **style)
    for axis, label in zip(axes, ("ms per training step", "MB saved for the backward pass"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="maximum span L, timesteps", ylabel=label)
        spans = sorted({result["span"] for result in results})
        axis.set_xticks(spans, [f"{span:,}" for span in spans])
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)
