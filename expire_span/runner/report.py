"""Tables of finished runs, made from their folders alone: `expire-span-report RUN...`

Runs that differ in nothing but the seed share a row. A setting has a column where it tells rows apart and the names of
task and model do not explain it: those under `model.` where one model has several, all others where one task has.
"""

import argparse
import csv
import json
import math
import operator
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from expire_span.runner.record import read_metrics

OUTPUT_ONLY = {"wandb", "hydra"}  # groups of the config that change no figure ...
IDLE = {"run.checkpoint_every", "run.progress"}  # ... and keys
COSTS = (
    "memory/bytes",  # carried state of one stream
    "perf/ms_per_batch",
    "perf/tokens_per_second",
    "perf/peak_memory_gb",  # CUDA: allocated
    "perf/peak_resident_gb",  # CPU: the whole process
)
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
DISTANCE = re.compile(r"(.+)_distance_(\d+)_(\d+)")


@dataclass(frozen=True)
class Run:
    """One run folder. `settings` is the flat config and protocol; `trouble` says why it has no place in a table."""

    folder: Path
    summary: dict[str, Any]
    settings: dict[str, Any]
    seed: tuple[tuple[str, Any], ...]  # every seed of the config: a task's data may have its own
    figures: dict[str, float]
    trouble: str = ""

    @property
    def task(self) -> str:
        return self.summary["task"]

    @property
    def model(self) -> str:
        return self.summary["model"]

    def cost(self, name: str) -> float | None:
        """A figure that is measured in training or in testing; testing's goes first."""
        return next((self.figures[key] for key in (f"test/{name}", f"valid/{name}", name) if key in self.figures), None)

    def results(self) -> list[str]:
        """Names of the figures that the task is judged by."""
        measure = self.summary.get("measure")
        return [name for name in self.figures
                if name.startswith("rl/") or (name.endswith(f"/{measure}") and not name.startswith("train/"))]


Group = list[Run]  # equal in everything but the seed


# From folders to groups

def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Runs of these folders and of all folders below them, broken and unfinished ones too (see `Run.trouble`)."""
    found: dict[Path, Path] = {}
    for path in paths:
        folders = list(_run_folders(Path(path)))
        if not folders:
            reason = "holds no run (summary.json or .hydra)" if Path(path).is_dir() else "is not a folder"
            raise ValueError(f"{path} {reason}; give a run folder, or a folder of run folders")
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return [_load(folder) for folder in found.values()]


def _run_folders(root: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(root):
        if ".hydra" in below or {"summary.json", "run.log"} & set(files):
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _load(folder: Path) -> Run:
    summary: dict[str, Any] = {}
    try:
        if not (folder / "summary.json").exists():
            raise ValueError(f"no summary.json: stopped, failed or still running{_last_update(folder)}")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if missing := {"task", "model", "figures", "protocol"} - summary.keys():
            raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
        if not summary.get("finished"):
            raise ValueError(f"unfinished{_last_update(folder)}")
        figures = {name: value for name, value in summary["figures"].items() if value is not None}  # null: NaN
        if not all(math.isfinite(value) for value in figures.values()):
            raise ValueError("summary.json has figures that are no finite numbers")
        # Tokens follow from the rest of the protocol, up to where an episode happens to end.
        protocol = {name: value for name, value in summary["protocol"].items() if name != "tokens"}
        also = {name: summary.get(name) or {} for name in ("data", "trained")}
        everything = dict(_flat({**_config(folder, summary), "protocol": protocol, **also}))
        everything["evaluate"] = "another run" if everything.get("evaluate") else None
        seed = {key: value for key, value in everything.items() if key.rsplit(".")[-1] == "seed"}
        settings = {key: value for key, value in everything.items() if key not in {*seed, *IDLE}}
        return Run(folder, summary, settings, tuple(seed.items()), figures)
    except Exception as error:  # whatever lies in that folder, the other runs still make a table
        reason = str(error).partition("\n")[0]
        return Run(folder, summary if isinstance(summary, dict) else {}, {}, (), {},
                   reason if type(error) is ValueError else f"unreadable: {type(error).__name__}: {reason}")


def _last_update(folder: Path) -> str:
    path, log = folder / "metrics.jsonl", folder / "run.log"
    rows = read_metrics(path) if path.exists() else []
    last = f", last logged update {rows[-1].get('update')}" if rows else ", nothing logged"
    errors = re.findall(r"\[ERROR\] (.*)", log.read_text(errors="replace")) if log.exists() else []
    return last + (f"; {errors[-1]}" if errors else "")


def _config(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    if summary.get("config"):
        return {key: value for key, value in summary["config"].items() if key not in OUTPUT_ONLY}
    config = cast(DictConfig, OmegaConf.load(folder / ".hydra/config.yaml"))
    for key in OUTPUT_ONLY:
        config.pop(key, None)  # before resolving: these refer to a running Hydra
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else value


def _groups(runs: Sequence[Run]) -> tuple[list[Group], list[tuple[Run, str]]]:
    """Groups of runs, and the runs left out of them with the reason. Of equal runs of one seed the latest counts."""
    left_out = [(run, run.trouble) for run in runs if run.trouble]
    groups: dict[Any, dict[Any, Run]] = defaultdict(dict)
    for run in sorted((run for run in runs if not run.trouble), key=lambda run: run.summary.get("started") or ""):
        group = groups[run.task, run.model, frozenset(run.settings.items())]
        if earlier := group.pop(run.seed, None):
            left_out.append((earlier, f"the same settings and seed as {run.folder}, which is later"))
        group[run.seed] = run
    return [list(group.values()) for group in groups.values()], left_out


def _telling(groups: Sequence[Group]) -> list[str]:
    """Names of the settings that tell groups apart."""
    def explained(key: str) -> bool:
        values = defaultdict(set)
        for run, *_ in groups:
            own = key.startswith("model.") or key == "protocol.max_span"
            values[run.task, run.model if own else ""].add(run.settings.get(key))
        return all(len(several) == 1 for several in values.values())

    columns = {("updates", tuple(run.settings.get("protocol.updates") for run, *_ in groups)): ""}  # has its own column
    for key in dict.fromkeys(key for run, *_ in groups for key in run.settings):
        if not explained(key):
            # One setting often stands in several places: train.block, task.block, protocol.block.
            columns.setdefault((key.rsplit(".")[-1], tuple(run.settings.get(key) for run, *_ in groups)), key)
    return [key for key in columns.values() if key]


# From groups to text

def table(runs: Sequence[Run], bars: Sequence[str] = (), distance: bool = False) -> str:
    """Markdown: a row for each group of runs, footnotes, and beneath it the runs that are not in it and why."""
    parsed = [_bar(bar, runs) for bar in bars]
    groups, left_out = _groups(runs)
    telling = _telling(groups)
    groups.sort(key=lambda group: [_order(cell) for cell in _names(group[0], telling)])
    notes = list(dict.fromkeys(note for group in groups for note in _notes(group)))
    results = list(dict.fromkeys(name for group in groups for run in group for name in run.results()))
    costs = [name for name in COSTS if any(run.cost(name) is not None for group in groups for run in group)]

    def row(group: Group) -> list[str]:
        task, model, *settings = _names(group[0], telling)
        marks = "".join(f" [{notes.index(note) + 1}]" for note in _notes(group))
        return [
            str(task), f"{model}{marks}", *map(_number, settings), str(len(group)),
            *(_spread([run.figures.get(name) for run in group]) for name in results),
            *(_reached(group, *bar) for bar in parsed),
            _spread([run.cost("memory/size") for run in group]),
            *(_spread([run.cost(name) for run in group]).partition(" ± ")[0] for name in costs),
            _number(group[0].settings.get("protocol.updates")),
        ]

    header = ["task", "model", *telling, "seeds", *results, *bars, "memory/size", *costs, "updates"]
    parts = [_markdown(header, [row(group) for group in groups])] if groups else ["No finished run."]
    if notes:
        parts.append("\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1)))
    if left_out:
        parts.append("\n".join(["Not in the table:", *(f"- {run.folder}: {reason}" for run, reason in left_out)]))
    if distance:
        parts += _distances(groups, telling)
    return "\n\n".join(parts) + "\n"


def _distances(groups: Sequence[Group], telling: Sequence[str]) -> list[str]:
    """A table for each figure that is known by how far back, in timesteps, the answer lies; nearest first."""
    bins: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for match in (DISTANCE.fullmatch(name) for group in groups for run in group for name in run.figures):
        if match:
            bins[match[1]].add((int(match[2]), int(match[3])))
    tables = []
    for figure, ends in sorted(bins.items()):
        names = {f"{low} to {high}": f"{figure}_distance_{low}_{high}" for low, high in sorted(ends)}
        rows = [
            [*map(_number, _names(group[0], telling)), str(len(group)),
             *(_spread([run.figures.get(name) for run in group]) for name in names.values())]
            for group in groups
        ]
        header = ["task", "model", *telling, "seeds", *names]
        tables.append(f"{figure} by distance (timesteps)\n\n{_markdown(header, rows)}")
    return tables or ["No figures by distance."]


def _names(run: Run, telling: Sequence[str]) -> list[Any]:
    return [run.task, run.model, *(run.settings.get(key) for key in telling)]


def _notes(group: Group) -> list[str]:
    commits = sorted({str(run.summary.get("commit"))[:10] for run in group})
    mixed = [f"seeds of different commits: {', '.join(commits)}"] if len(commits) > 1 else []
    return [*(group[0].summary.get("simplifications") or []), *mixed]


def _order(cell: Any) -> tuple[bool, float, str]:
    number = isinstance(cell, int | float)
    return not number, cell if number else 0, str(cell)


def _bar(text: str, runs: Sequence[Run]) -> tuple[str, Callable[[float, float], bool], float]:
    """Figure, comparison and value of `figure>=value`."""
    match = re.fullmatch(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    try:
        name, compare, value = match[1], COMPARISONS[match[2]], float(match[3])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"bar {text!r} must look like 'test/accuracy>=0.95'") from None
    known = sorted({figure for run in runs for figure in run.figures})
    if known and name not in known:
        raise ValueError(f"bar {text!r}: no run has a figure {name!r}; there are {', '.join(known)}")
    return name, compare, value


def _reached(group: Group, name: str, compare: Callable[[float, float], bool], value: float) -> str:
    """How many seeds reached a bar; one without the figure (NaN) did not, unless the task knows no such figure."""
    known = [run.figures[name] for run in group if name in run.figures]
    return f"{sum(compare(figure, value) for figure in known)} of {len(group)}" if known else ""


def _spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation of those seeds that have the figure, and how many where not all do."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = _number(statistics.fmean(known))
    if len(known) > 1:
        text += f" ± {_number(statistics.stdev(known), digits=2)}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def _number(value: Any, digits: int = 4) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def write_csv(path: str | Path, runs: Sequence[Run]) -> None:
    """One row for each finished run with all its settings (dots) and figures (slashes), no digit lost."""
    rows = [
        {"folder": str(run.folder), "task": run.task, "model": run.model, "commit": run.summary.get("commit"),
         "dirty": run.summary.get("dirty"), **dict(run.seed), **run.settings, **run.figures}
        for run in runs if not run.trouble
    ]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="expire-span-report", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare runs in a Markdown table: one row for each group of runs that differ only in the seed.",
        epilog="example:\n  expire-span-report runs --bar 'test/accuracy>=0.95' --distance --csv runs.csv\n\n"
        "Figures are mean ± sample standard deviation over seeds, named as in metrics.jsonl: memory/size is the\n"
        "mean number of memories that a query sees, memory/bytes the carried state of one stream.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder that has some below it")
    parser.add_argument("--bar", action="append", default=[], metavar="'FIGURE>=VALUE'",
                        help="add a column: how many seeds reached this (>=, <=, > or <; may be given several times)")
    parser.add_argument("--distance", action="store_true", help="add a table by how far back the answer lies")
    parser.add_argument("--csv", metavar="FILE", help="write one row for each run, with all settings and figures")
    parser.add_argument("--markdown", metavar="FILE", help="write what is printed to a file, too")
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.runs)
        text = table(runs, options.bar, options.distance)
        if options.markdown:
            Path(options.markdown).write_text(text, encoding="utf-8")
        if options.csv:
            write_csv(options.csv, runs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(text, end="")


if __name__ == "__main__":
    main()
