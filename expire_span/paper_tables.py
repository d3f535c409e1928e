"""The paper's tables, with its numbers beside those of runs.

    RUNS/SIZE/PRESET/seedN     one run for each row and seed; a row that two tables share is run once

A table is a file of conf/tables: a title, metrics, and rows, which are presets of conf/experiment (at the paper's size)
or conf/experiment/SIZE.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from .results import load_runs
from .runner.commands.report import format_number, format_seeds, group_seeds
from .runner.run_folder.files import read_summary

CONF = files("expire_span.conf")
SIZES = ("mini", "paper")
COLORS = ("#cf4457", "#2c6a82", "#d99a2b", "#6b6b6b")
COSTS = {  # columns beside the results, by metric
    "memory/held": "memories held",
    "memory/bytes": "bytes of a stream",
    "perf/ms_per_batch": "ms per training step",
    "perf/peak_memory_gb": "peak GPU memory, GB",
    "perf/peak_resident_gb": "peak resident memory, GB",
}


class Table(NamedTuple):
    """One of the paper's tables, or a figure that a table can show."""

    name: str
    title: str
    metrics: list[str]
    rows: dict[str, str]  # what the table calls each preset
    against: str = ""  # the metric on the horizontal axis of a figure; none: bars


class Line(NamedTuple):
    """A row of a table as it was run: with one config, and some number of seeds."""

    preset: str
    title: str
    paper: dict[str, float]  # the paper's numbers
    runs: pd.DataFrame  # as `load_runs` gives them; empty: not run


def table_names() -> list[str]:
    """All tables that there are."""
    return sorted(path.name.removesuffix(".yaml") for path in (CONF / "tables").iterdir())


def read_table(name: str) -> Table:
    """Raises ValueError for a table that does not exist."""
    if name not in table_names():
        raise ValueError(f"there is no {name}; there are {', '.join(table_names())}, or all of them by all")
    content: Any = OmegaConf.to_container(OmegaConf.create((CONF / "tables" / f"{name}.yaml").read_text()))
    return Table(name, **content)


def preset_name(preset: str, size: str) -> str:
    """What `experiment=` calls a preset at a size."""
    return preset if size == "paper" else f"{size}/{preset}"


def paper_numbers(preset: str) -> dict[str, float]:
    """The paper's own numbers for a row, by metric."""
    content: Any = OmegaConf.create((CONF / "experiment" / f"{preset}.yaml").read_text())
    return dict(content.get("paper") or {})


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds the result of a run."""
    try:
        return bool(read_summary(folder)["finished"])
    except (KeyError, OSError, ValueError):
        return False


def missing_seeds(preset: str, size: str, seeds: Sequence[int], runs: Path) -> tuple[int, ...]:
    """The seeds of a row that are still to be run."""
    return tuple(seed for seed in seeds if not is_finished(runs / size / preset / f"seed{seed}"))


def read_lines(table: Table, size: str, runs: Path) -> tuple[list[Line], list[str]]:
    """The lines of a table, from run folders alone; and what is in none of them, with the reason.

    A row whose runs differ in more than the seed has several lines.
    """
    lines, left_out = [], []
    for preset, title in table.rows.items():
        paper, folder = paper_numbers(preset), runs / size / preset
        try:
            groups, others = group_seeds(load_runs(folder))
        except ValueError:  # there is no run
            groups, others = [], pd.DataFrame()
        left_out += [f"{run.folder}: {run.problem}" for run in others.itertuples()]
        runs_of_lines = [group for _, group in groups] or [pd.DataFrame()]
        lines += [Line(preset, title, paper, runs_of_line) for runs_of_line in runs_of_lines]
    return lines, left_out


def markdown(table: Table, size: str, lines: Sequence[Line], left_out: Sequence[str], seeds: Sequence[int]) -> str:
    """The table, and beneath it what its runs were."""
    rows = [cells(table, line, seeds) for line in lines]
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if any(row.get(name) for row in rows)]  # a figure may have no numbers of the paper
    frame = pd.DataFrame([[row.get(name, "") for name in shown] for row in rows], columns=shown)
    parts = [f"# {table.title}", f"`expire-span-paper {table.name} size={size}`"]
    if size != "paper":
        parts.append(f"The paper's numbers are of its own sizes, ours of size={size}, with spans in proportion.")
    parts.append(frame.to_markdown(index=False, tablefmt="github", disable_numparse=True))
    if notes := [*provenance_notes(lines), *(f"Not in the table: {text}" for text in left_out)]:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def cells(table: Table, line: Line, seeds: Sequence[int]) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    row = {"": line.title}
    for metric in table.metrics:
        row[f"{head(metric)}: paper"] = (
            format_number(scaled(metric, line.paper[metric])) if metric in line.paper else ""
        )
        row["ours" if len(table.metrics) == 1 else f"{head(metric)}: ours"] = result(metric, line)
    count = len(line.runs)
    row["seeds"] = str(count) if count >= len(seeds) else f"{count} of {len(seeds)}"
    if count:
        row["L"] = format_number(line.runs["protocol.max_span"].iloc[0])
    for metric, name in COSTS.items():
        if metric not in table.metrics and len(values := measured(metric, line.runs)):
            row[name] = format_seeds(values, spread=False)
    if count:
        row["updates"] = format_number(line.runs["protocol.updates"].iloc[0])
    return row


def result(metric: str, line: Line) -> str:
    """Ours: mean and standard deviation over the seeds, or why there is none."""
    if metric not in line.paper and line.paper:
        return ""  # another row's metric
    if line.runs.empty:
        return "not run"
    values = measured(metric, line.runs)
    return format_seeds(scaled(metric, values)) if len(values) else "not measured"


def measured(metric: str, runs: pd.DataFrame) -> pd.Series:
    """A metric of each run, of the test where it is measured there, too; empty if no run has it."""
    for name in (f"test/{metric}", f"valid/{metric}", metric):
        if name in runs and runs[name].notna().any():
            return runs[name]
    return pd.Series(dtype=float)


def scaled(metric: str, value: Any) -> Any:
    """Accuracies and errors in percent."""
    return 100 * value if metric.endswith(("/accuracy", "/error")) else value


def head(metric: str) -> str:
    """What a column is called."""
    return f"{metric}, %" if metric.endswith(("/accuracy", "/error")) else COSTS.get(metric, metric)


def provenance_notes(lines: Sequence[Line]) -> list[str]:
    """Where and when the runs were made, and what is simpler than in the paper."""
    runs = pd.concat([line.runs for line in lines]) if any(len(line.runs) for line in lines) else pd.DataFrame()
    if runs.empty:
        return []
    notes = []
    by = runs.groupby(["protocol.device", "protocol.precision", "commit"], dropna=False)
    for (device, precision, commit), group in by:
        first, last = (f"{time:%Y-%m-%d}" for time in (group["started"].min(), group["started"].max()))
        when = first if first == last else f"{first} to {last}"
        notes.append(f"{len(group)} runs on {device}, {precision}, commit {str(commit)[:10]}, {when}.")
    simplified = dict.fromkeys(note for texts in runs["simplifications"] for note in texts)
    return [*notes, *(f"Simplified: {note}." for note in simplified)]


def csv_rows(lines: Sequence[Line], runs_folder: Path) -> pd.DataFrame:
    """One row for each run: its row of the table, the paper's numbers, its folder, and all settings and metrics."""
    frames = []
    for line in lines:
        named = {"preset": line.preset, "row": line.title} | {f"paper: {name}": n for name, n in line.paper.items()}
        runs = line.runs.drop(columns=[*named, "problem", "simplifications"], errors="ignore").reset_index(drop=True)
        if len(runs):
            runs["folder"] = [str(Path(folder).relative_to(runs_folder)) for folder in runs["folder"]]
        frames.append(pd.DataFrame(named, index=runs.index).join(runs) if len(runs) else pd.DataFrame([named]))
    return pd.concat(frames, ignore_index=True)


def draw(table: Table, size: str, lines: Sequence[Line], paths: Sequence[Path]) -> None:
    """A picture of the first metric: bars, or points against another metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line for line in lines if table.metrics[0] in line.paper or not line.paper]
    height = 4.0 if table.against else 0.9 + 0.45 * len(shown)
    figure, axis = plt.subplots(figsize=(7, height), layout="constrained")
    (draw_against if table.against else draw_bars)(axis, table, size, shown)
    axis.set_title(table.title)
    if axis.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_bars(axis: Any, table: Table, size: str, lines: Sequence[Line]) -> None:
    """A bar for each row: the paper's number, each seed, and their mean."""
    metric = table.metrics[0]
    for place, line in enumerate(lines):
        paper, ours = scaled(metric, line.paper.get(metric, math.nan)), scaled(metric, measured(metric, line.runs))
        labels = ("the paper", f"{size}, each seed", f"{size}, mean") if place == 0 else (None,) * 3
        axis.plot(paper, place, "D", color="gray", label=labels[0])
        axis.plot(ours, [place] * len(ours), "o", markersize=4, color=COLORS[0], label=labels[1])
        axis.barh(place, ours.mean(), height=0.5, color=COLORS[0], alpha=0.35, label=labels[2])
    axis.set_yticks(range(len(lines)), [line.title for line in lines])
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
    for color, (model, rows) in zip(COLORS, models.items(), strict=False):
        means = pd.DataFrame([row.mean() for row in rows]).sort_values("x")
        axis.plot(means["x"], means["y"], color=color)
        every = pd.concat(rows)
        axis.plot(every["x"], every["y"], "o", markersize=5, color=color, alpha=0.6, label=f"{model}, each seed")
    axis.set(xlabel=f"{head(table.against)}, {size}", ylabel=head(metric))
    axis.grid(alpha=0.3)


def write(table: Table, size: str, seeds: Sequence[int], runs: Path, out: Path) -> tuple[str, int]:
    """Write NAME.md, .csv, .svg and .png; return the Markdown, and how many runs are missing."""
    lines, left_out = read_lines(table, size, runs)
    text = markdown(table, size, lines, left_out, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{table.name}.md").write_text(text, encoding="utf-8")
    csv_rows(lines, runs).to_csv(out / f"{table.name}.csv", index=False)
    draw(table, size, lines, [out / f"{table.name}.{ending}" for ending in ("svg", "png")])
    return text, sum(len(missing_seeds(preset, size, seeds, runs)) for preset in table.rows)
