"""The paper's tables, with its numbers beside those of runs.

    RUNS/SIZE/PRESET/seedN     one run for each row and seed; a row that two tables share is run once

A table is a file of conf/tables: a title, metrics, and rows. A row is a preset of conf/experiment (at the paper's size)
or conf/experiment/SIZE; or one of the `curves` of a task, a value of one key for one model; or `settings`, as the
command line has them.
"""

import hashlib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
from omegaconf import OmegaConf

from .paper_rows import CONF, Row, load_row, paper_numbers, preset_name
from .runner.commands.report import format_number, format_seeds, group_seeds, parse_threshold
from .runner.run_folder.files import read_summary

SIZES = ("mini", "paper")
SEEDS = (1, 2, 3)  # of a row whose table says nothing else
PATHS = ("task.path", "task.data_dir")  # keys of the config that say where data lies on one machine
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
    rows: list[Row]
    against: str = ""  # the metric on the horizontal axis of a figure; none: bars
    learned: str = ""  # a condition that tells seeds that have learned the task: test/accuracy>=0.9
    command: str = ""  # which makes it
    given: Sequence[str] = ()  # keys that the command line must give, such as task.path
    page: Mapping[str, Any] | None = None  # what a page of `expire-span-spans` shows of the rows' first seeds


class Line(NamedTuple):
    """A row of a table as it was run: with one config, and some number of seeds."""

    row: Row
    runs: pd.DataFrame  # as `load_runs` gives them; empty: not run


def table_names() -> list[str]:
    """All tables that there are."""
    return sorted(path.name.removesuffix(".yaml") for path in (CONF / "tables").iterdir())


def read_table(name: str, size: str, seeds: Sequence[int] = ()) -> Table:
    """Read a table.

    Args:
        name: a file of conf/tables.
        size: one of SIZES. A table of curves may have none at a size, and then has no rows.
        seeds: those of every row; none: as many as the table says.

    Raises:
        ValueError: if there is no such table.
    """
    if name not in table_names():
        raise ValueError(f"there is no {name}; there are {', '.join(table_names())}, or all of them by all")
    content = table_content(name)
    counts = content.pop("seeds", {})
    common = tuple(seeds or (range(1, counts + 1) if isinstance(counts, int) else SEEDS))
    rows = [
        Row(preset, title, (f"experiment={preset_name(preset, size)}",), paper_numbers(preset), common)
        for preset, title in content.pop("rows", {}).items()
    ]
    rows += [settings_row(title, text, size, common) for title, text in of_size(content, "settings", size).items()]
    for model, settings in of_size(content, "curves", size).items():
        of_model = tuple(seeds or range(1, counts.get(model, len(SEEDS)) + 1))
        rows += curve(name, f"task={content['task']}", model, settings, size, of_model)
    content.pop("task", None)
    given = of_size(content, "given", size)
    command = " ".join(["expire-span-paper", name, f"size={size}", *(f"{key}=FILE" for key in given)])
    if seeds:
        command += f" --seeds {','.join(map(str, seeds))}"
    return Table(name, rows=rows, given=list(given), command=command, **content)


def of_size(content: dict[str, Any], key: str, size: str) -> Any:
    """Remove a key from a table's content, and return what it has for a size."""
    return content.pop(key, {}).get(size, {})


def settings_row(title: str, text: str, size: str, seeds: tuple[int, ...]) -> Row:
    """A row with settings as the command line has them; tables in which they are the same share its runs."""
    overrides = tuple(shlex.split(text))
    preset = overrides[0].partition("experiment=")[2].removeprefix(f"{size}/")
    if not preset or len(overrides) > 1:
        preset = f"settings/{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Row(preset, title, overrides, {}, seeds)


def curve(name: str, task: str, model: str, settings: dict[str, Any], size: str, seeds: tuple[int, ...]) -> list[Row]:
    """A row for each value of the one key that has several."""
    [(key, values)] = [(key, value) for key, value in settings.items() if isinstance(value, list)]
    fixed = [f"{other}={value}" for other, value in settings.items() if other != key]
    rows = []
    for value in values:
        title = f"{model}, {key.rpartition('.')[2]}={value}"
        overrides = (task, f"model={model}", f"size={size}", *fixed, f"{key}={value}")
        rows.append(Row(f"{name}/{model}_{value}", title, overrides, {}, seeds, is_curve=True))
    return rows


def table_content(name: str) -> dict[str, Any]:
    """A file of conf/tables."""
    text = (CONF / "tables" / f"{name}.yaml").read_text()
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))


def read_lines(table: Table, size: str, runs: Path) -> tuple[list[Line], list[str]]:
    """The lines of a table, from run folders alone; and what is in none of them, with the reason.

    A row whose runs differ in more than the seed has several lines.
    """
    lines, left_out = [], []
    for row in table.rows:
        found = load_row(row, size, runs)
        groups, others = group_seeds(found) if len(found) else ([], found)
        left_out += [f"{run.folder}: {run.problem}".replace(f"{runs}/", "") for run in others.itertuples()]
        runs_of_lines = [group for _, group in groups] or [pd.DataFrame()]
        lines += [Line(row, runs_of_line) for runs_of_line in runs_of_lines]
    return lines, left_out


def num_holes(lines: Sequence[Line]) -> int:
    """How many runs the lines of a table lack."""
    lacking: dict[str, set[int]] = {}
    for line in lines:
        lacking.setdefault(line.row.preset, set(line.row.seeds)).difference_update(line.runs.get("seed", ()))
    return sum(map(len, lacking.values()))


def markdown(table: Table, size: str, lines: Sequence[Line], left_out: Sequence[str], tuning: str = "") -> str:
    """The table, and beneath it what its runs were; `tuning` says in Markdown how their settings were chosen."""
    known = [
        metric
        for metric in table.metrics
        if any(metric in line.row.paper or len(measured(metric, line.runs)) for line in lines)
    ]
    rows = [cells(table._replace(metrics=known or table.metrics), line) for line in lines]
    names = dict.fromkeys(name for row in rows for name in row)
    shown = [name for name in names if any(row.get(name) for row in rows)]  # a figure may have no numbers of the paper
    frame = pd.DataFrame([[row.get(name, "") for name in shown] for row in rows], columns=shown)
    parts = [f"# {table.title}", f"`{table.command}`"]
    if size != "paper" and any(line.row.paper for line in lines):
        parts.append(f"The paper's numbers are of its own sizes, ours of size={size}, with spans in proportion.")
    parts.append(frame.to_markdown(index=False, tablefmt="github", disable_numparse=True))
    if tuning:
        parts.append(tuning)
    if notes := [*provenance_notes(lines), *(f"Not in the table: {text}" for text in left_out)]:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def cells(table: Table, line: Line) -> dict[str, str]:
    """A row of the table, by the heads of its columns."""
    row = {"": line.row.title}
    for metric in table.metrics:
        paper = line.row.paper
        row[f"{head(metric)}: paper"] = format_number(scaled(metric, paper[metric])) if metric in paper else ""
        row["ours" if len(table.metrics) == 1 else f"{head(metric)}: ours"] = result(metric, line)
    count, planned = len(line.runs), len(line.row.seeds)
    row["seeds"] = str(count) if count >= planned else f"{count} of {planned}"
    if count:
        if table.learned:
            metric, compares, value = parse_threshold(table.learned, ())
            learned = int(compares(measured(metric, line.runs), value).sum())
            row[table.learned] = f"{learned} of {count}"
        row["L"] = format_number(line.runs["protocol.max_span"].iloc[0])
    for metric, name in COSTS.items():
        if metric not in table.metrics and len(values := measured(metric, line.runs)):
            row[name] = format_seeds(values, spread=metric == "memory/held")
    if count:
        row["updates"] = format_number(line.runs["protocol.updates"].iloc[0])
    return row


def result(metric: str, line: Line) -> str:
    """Ours: mean and standard deviation over the seeds, or why there is none."""
    if metric not in line.row.paper and line.row.paper:
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
    """Where, when and how the runs were made, what was far behind, is simpler than in the paper, or left open by it."""
    if not any(len(line.runs) for line in lines):
        return []
    runs = pd.concat([line.runs for line in lines])
    notes = []
    by = runs.groupby(["protocol.device", "protocol.precision", "commit", "dirty"], dropna=False)
    for (device, precision, commit, dirty), group in by:
        first, last = (f"{time:%Y-%m-%d}" for time in (group["started"].min(), group["started"].max()))
        when = first if first == last else f"{first} to {last}"
        changed = " with uncommitted changes" if str(dirty) == "True" else ""
        notes.append(f"{num_runs(group)} on {device}, {precision}, commit {str(commit)[:10]}{changed}, {when}.")
    names = ("batch_size", "block_size", "eval_batch_size", "eval_block_size")
    for sizes, group in runs.groupby([f"protocol.{name}" for name in names], dropna=False):
        batch, block, eval_batch, eval_block = map(format_number, sizes)
        which = "" if len(group) == len(runs) else f"{num_runs(group)}: "
        notes.append(
            f"{which}Training in {batch} streams and blocks of {block} timesteps, evaluation of the last weights in "
            f"{eval_batch} streams and blocks of {eval_block}, from an empty memory."
        )
    for line in lines:
        for run in line.runs.itertuples():
            if run.far_behind:
                notes.append(f"{line.row.title}, seed {run.seed}, was far behind its recipe: {run.far_behind}.")
    notes.append("Times are those of the runs themselves, which may have shared their machine with other work.")
    simplified = dict.fromkeys(note for texts in runs["simplifications"] for note in texts)
    notes += [f"Simplified: {note}." for note in simplified]
    if choices := our_choices(runs["folder"]):
        notes.append(f"Our choices, where the paper is silent: {choices}.")
    return notes


def num_runs(runs: pd.DataFrame) -> str:
    """How many runs these are."""
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def our_choices(folders: Iterable[str]) -> str:
    """The settings that are neither the paper's nor its released code's, with all values that these runs have."""
    values: dict[str, dict[str, None]] = {}
    for folder in folders:
        for key, value in (read_summary(Path(folder)).get("value_sources") or {}).get("our choice", {}).items():
            if key not in PATHS:
                values.setdefault(key, {})[str(value)] = None
    return ", ".join(f"{key} {' or '.join(several)}" for key, several in sorted(values.items()))


def csv_rows(lines: Sequence[Line], runs_folder: Path) -> pd.DataFrame:
    """One row for each run: its row of the table, the paper's numbers, its folder, and all settings and metrics.

    Lines of one row, whose settings differ, have numbers: 1, 2 ...
    """
    frames: list[pd.DataFrame] = []
    numbers: dict[str, int] = {}
    for line in lines:
        numbers[line.row.preset] = numbers.get(line.row.preset, 0) + 1
        paper = {f"paper: {name}": number for name, number in line.row.paper.items()}
        named: dict[str, Any] = {"preset": line.row.preset, "row": line.row.title, "line": numbers[line.row.preset]}
        named |= {"planned_seeds": len(line.row.seeds)} | paper
        runs = line.runs.drop(columns=[*named, *PATHS, "problem", "simplifications"], errors="ignore").reset_index(
            drop=True
        )
        if len(runs):
            runs["folder"] = [str(Path(folder).relative_to(runs_folder)) for folder in runs["folder"]]
        frames.append(pd.DataFrame(named, index=runs.index).join(runs) if len(runs) else pd.DataFrame([named]))
    return pd.concat(frames, ignore_index=True)
