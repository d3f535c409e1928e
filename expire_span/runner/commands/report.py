"""Compare finished runs in Markdown, from their folders alone: `expire-span-report RUN...`

Runs that differ in nothing but the seed share a row. A setting has a column where it tells rows apart and the names of
task and model do not explain it: settings under `model.` where one model has several values, others where one task has.
"""

import argparse
import difflib
import operator
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from expire_span.results import load_runs, metric_columns, setting_columns

from ..errors import exit_with_message
from .output_files import output_path, write_output

# None of these changes a metric; tokens follow from the other settings, up to where an episode happens to end.
IGNORED_SETTINGS = {"run.checkpoint_every", "run.progress_bar", "protocol.tokens"}
MEMORY = ("memory/size", "memory/held")  # what a query sees, and what a layer holds
COSTS = (
    "memory/bytes",  # carried state of one stream
    "perf/ms_per_batch",
    "perf/ms_per_memory_block",
    "perf/ms_per_rollout",
    "perf/tokens_per_second",
    "perf/peak_memory_gb",  # CUDA: allocated
    "perf/peak_resident_gb",  # CPU: the whole process
)
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
Groups = Any  # runs as pandas groups them; in each group only the seeds differ


def markdown_report(runs: pd.DataFrame, thresholds: Iterable[str] = (), distance: bool = False) -> str:
    """Compare runs in Markdown: a row for each group of seeds, footnotes, and the runs left out with the reason.

    Args:
        runs: from `load_runs`.
        thresholds: conditions such as `test/accuracy>=0.95`; each adds a column: how many seeds meet it.
        distance: add a table for each metric that is known by how far back the answer lies.

    Raises:
        ValueError: a threshold is malformed, or no run has its metric.
    """
    conditions = {text: parse_threshold(text, metric_columns(runs)) for text in thresholds}
    groups, left_out = group_seeds(runs)
    names = ["task", "model", *distinguishing_settings(groups)]
    rows = groups[names].first().sort_values(names).map(format_number)
    rows["seeds"] = groups.size().astype(str)
    parts = compare(groups, rows, conditions) if len(rows) else ["No finished run."]
    if distance:
        parts += compare_by_distance(groups, rows) or ["No metrics by distance."]
    if len(left_out):
        parts.append("\n".join(["Not in the table:", *("- " + left_out["folder"] + ": " + left_out["problem"])]))
    return "\n\n".join(parts) + "\n"


def group_seeds(runs: pd.DataFrame) -> tuple[Groups, pd.DataFrame]:
    """Group runs that differ in nothing but the seed; of equal runs with the same seed only the latest counts.

    Returns:
        The groups, and the runs that are in none of them, with the reason as their `problem`.
    """
    runs = runs.sort_values("started", kind="stable", na_position="first", ignore_index=True)
    sound = runs[runs["problem"] == ""]
    keys = ["task", "model", *(name for name in _compared(sound) if sound[name].nunique(dropna=False) > 1)]
    seeds = [name for name in runs if name == "seed" or name.endswith(".seed")]
    latest = sound.groupby([*keys, *seeds], dropna=False)["folder"].transform("last")
    earlier = latest[latest != sound["folder"]]
    runs.loc[earlier.index, "problem"] = "the same settings and seed as " + earlier + ", which is later"
    number = sound.drop(earlier.index).groupby(keys, dropna=False, sort=False).ngroup()
    return runs.loc[number.index].set_index(number).groupby(level=0), runs.drop(number.index)


def distinguishing_settings(groups: Groups) -> list[str]:
    """Names of the settings that tell groups apart, where the names of task and model do not."""
    first = groups.head(1)
    by_task, by_model = first.groupby("task"), first.groupby(["task", "model"])
    # One setting often stands in several places (train.block_size, protocol.block_size): the first one is shown.
    shown: dict[tuple[str, ...], str] = {}
    for name in ("protocol.updates", *_compared(first)) if len(first) else ():
        explained = by_model if name.startswith("model.") or name == "protocol.max_span" else by_task
        if (explained[name].nunique(dropna=False) > 1).any():
            last = name.rsplit(".")[-1].removeprefix("eval_")
            shown.setdefault((last, *first[name].astype("string").fillna("")), name)
    return [name for name in shown.values() if name != "protocol.updates"]  # which always has a column


def compare(groups: Groups, rows: pd.DataFrame, conditions: dict[str, tuple]) -> list[str]:
    """The table with results and costs, and its footnotes.

    Args:
        groups: from `group_seeds`.
        rows: the first columns of the table, a row for each group.
        conditions: for each column that counts seeds, what `parse_threshold` returns.
    """
    rows, runs = rows.copy(), groups.obj
    notes = groups[["folder", "commit", "simplifications", "far_behind"]].apply(footnotes)
    numbers = {note: number for number, note in enumerate(dict.fromkeys(notes[rows.index].explode().dropna()), 1)}
    rows["model"] += notes.map(lambda notes: "".join(f" [{numbers[note]}]" for note in notes))
    for name in result_metrics(runs):
        rows[name] = groups[name].apply(format_seeds)
        if (paper := f"paper: {name}") in runs:
            rows[paper] = groups[paper].first().map(format_number)
    for text, (metric, compares, value) in conditions.items():
        met = compares(runs[metric], value).groupby(level=0).sum()
        rows[text] = (met.astype(str) + " of " + rows["seeds"]).where(groups[metric].count() > 0, "")
    for name, values in costs(runs).items():
        rows[name] = values.groupby(level=0).apply(format_seeds, spread=name in MEMORY)
    rows["updates"] = groups["protocol.updates"].first().map(format_number)
    return [_table(rows), *(["\n".join(f"{number}. {note}" for note, number in numbers.items())] if numbers else [])]


def result_metrics(runs: pd.DataFrame) -> list[str]:
    """Metrics that the tasks are judged by: `rl/...`, and each task's own on every split but the training one."""
    names: list[str] = []
    for (_, metric), members in runs.groupby(["task", "metric"]):
        known = metric_columns(members.dropna(axis=1, how="all"))
        names += [name for name in known if re.match(rf"rl/|(?!train/).*/{re.escape(metric)}$", name)]
    return list(dict.fromkeys(names))


def costs(runs: pd.DataFrame) -> pd.DataFrame:
    """What each run costs: those of MEMORY and COSTS that any run has, as measured in testing, or else in training."""
    places = {name: runs.reindex(columns=[f"test/{name}", f"valid/{name}", name]) for name in (*MEMORY, *COSTS)}
    measured = {name: values.bfill(axis=1).iloc[:, 0] for name, values in places.items()}
    return pd.DataFrame(measured).dropna(axis=1, how="all")


def footnotes(group: pd.DataFrame) -> list[str]:
    """What a reader of a group's row should know: what it simplifies, mixed commits, and runs that were far behind."""
    commits = sorted({str(commit)[:10] for commit in group["commit"]})
    mixed = [f"seeds of different commits: {', '.join(commits)}"] if len(commits) > 1 else []
    simplified = "; ".join(group["simplifications"].iloc[0])
    behind = [
        f"{run.folder} was far behind its recipe: {run.far_behind}" for run in group.itertuples() if run.far_behind
    ]
    return [*([f"simplified: {simplified}"] if simplified else []), *mixed, *behind]


def compare_by_distance(groups: Groups, rows: pd.DataFrame) -> list[str]:
    """A table for each metric that is known by how far back the answer lies, in timesteps; nearest first."""
    tables: dict[str, pd.DataFrame] = {}
    matches = [re.fullmatch(r"(.+)_distance_(\d+)_(\d+)", name) for name in metric_columns(groups.obj)]
    for metric, low, high in sorted((match[1], int(match[2]), int(match[3])) for match in matches if match):
        values = groups[f"{metric}_distance_{low}_{high}"].apply(format_seeds)
        tables[metric] = tables.get(metric, rows).assign(**{f"{low} to {high}": values})
    return [f"{metric} by distance (timesteps)\n\n{_table(table)}" for metric, table in tables.items()]


def parse_threshold(text: str, known: Sequence[str]) -> tuple:
    """Metric, comparison and value of `metric>=value`. Raises ValueError for malformed text or an unknown metric."""
    match = re.fullmatch(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([-+]?[\d.]*\d(?:e[-+]?\d+)?)\s*", text, re.IGNORECASE)
    if not match:
        raise ValueError(f"threshold {text!r} must look like 'test/accuracy>=0.95'")
    metric, comparison, value = match.groups()
    if known and metric not in known:
        similar = difflib.get_close_matches(metric, known, n=5, cutoff=0.3) or sorted(known)[:5]
        raise ValueError(f"threshold {text!r}: no run has a metric {metric!r}, but for example {', '.join(similar)}")
    return metric, COMPARISONS[comparison], float(value)


def format_seeds(values: pd.Series, spread: bool = True) -> str:
    """Mean ± sample standard deviation of the seeds that have a value, and how many where not all do."""
    known = values.dropna().tolist()
    if not known:
        return ""
    text = format_number(statistics.fmean(known))
    if spread and len(known) > 1:
        text += f" ± {format_number(statistics.stdev(known), digits=2)}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def format_number(value: Any, digits: int = 4) -> str:
    """Format floats with `digits` significant digits, without decimals from 1000 on; missing values are empty."""
    if pd.isna(value) or not isinstance(value, float):
        return "" if pd.isna(value) else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _compared(runs: pd.DataFrame) -> list[str]:
    """Names of the settings that must be equal within a group: all but those ignored, and the seeds."""
    return [name for name in setting_columns(runs) if name not in IGNORED_SETTINGS and not name.endswith(".seed")]


def _table(rows: pd.DataFrame) -> str:
    escaped = rows.replace({r"\|": r"\\|", r"\n": " "}, regex=True)
    return escaped.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare runs in a Markdown table: one row for each group of runs that differ only in the seed.",
        epilog="example:\n  expire-span-report runs --threshold 'test/accuracy>=0.95' --distance --csv runs.csv\n\n"
        "Metrics are mean ± sample standard deviation over seeds, named as in metrics.jsonl: memory/size is the\n"
        "mean number of memories that a query sees, memory/held of those that a layer holds, memory/bytes the carried\n"
        "state of one stream.\n"
        "In a notebook: from expire_span.results import load_runs",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder, or a folder that has some below it")
    help_threshold = "add a column: how many seeds meet this (>=, <=, > or <; may be given several times)"
    add("--threshold", action="append", default=[], metavar="'METRIC>=VALUE'", help=help_threshold)
    add("--bar", help=argparse.SUPPRESS)
    add("--distance", action="store_true", help="add a table by how far back the answer lies")
    add("--csv", type=output_path, metavar="FILE", help="write one row for each run, with all settings and metrics")
    add("--markdown", type=output_path, metavar="FILE", help="write what is printed to a file, too")
    add(
        "--html", type=output_path, metavar="FILE", help="write a page with the table, plots and filters, for a browser"
    )
    options = parser.parse_args(arguments)
    if options.bar:
        parser.error(f"--bar is now called --threshold: --threshold '{options.bar}'")
    try:
        runs = load_runs(*options.runs)
        text = markdown_report(runs, options.threshold, options.distance)
        if options.markdown:
            write_output(options.markdown, text)
        if options.csv:
            table = runs[runs["problem"] == ""].drop(columns=["problem", "simplifications"])
            write_output(options.csv, table.to_csv(index=False))
        if options.html:
            from expire_span.comparison_page import comparison_page  # which needs this module

            write_output(options.html, comparison_page(runs))
    except Exception as error:
        exit_with_message(error)
    print(text, end="")


if __name__ == "__main__":
    main()
