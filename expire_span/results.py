"""Runs and their metrics as pandas tables, for `expire-span-report` and for notebooks.

Example:
    from expire_span.results import load_metrics, load_runs

    runs = load_runs("runs/2026-11-25")
    runs.groupby(["task", "model"])["test/accuracy"].agg(["mean", "std", "count"])
    load_metrics(runs.folder[0])["train/loss"].dropna().plot()
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from .runner.run_folder.files import check_regular, read_metrics, read_summary
from .runner.run_folder.summary import FORMAT, NO_SETTINGS

REQUIRED = {"format", "task", "model", "metric", "finished", "metrics", "protocol"}
RUN_COLUMNS = ["folder", "task", "model", "metric", "seed", "finished", "problem", "commit", "dirty", "started"]
RUN_COLUMNS += ["simplifications", "far_behind"]


def load_runs(*folders: str | Path) -> pd.DataFrame:
    """Load every run in these folders and in all folders below them, one row each.

    Columns:
        RUN_COLUMNS: `problem` says why a run has no place in a table (stopped, unreadable, written by an older version
            ...) and is empty otherwise. A run with a problem has no settings and metrics, so that no mean includes it.
            `far_behind` says which milestones of its recipe it missed by far, if any.
        settings, with dots: the config (`memory.alpha`), the `protocol.*` of the measurement, fingerprints of the
            `data.*` and, for evaluations, the values that training had instead (`trained.*`). Lists are JSON text.
        metrics, with slashes: the final ones, float64 (`test/accuracy`); one that was not a number is missing.
        the paper's figures: `paper: test/bpb`, float64, where a run reproduces a row of the paper's tables.

    Raises:
        ValueError: a folder is missing or holds no run. A run that cannot be read only gets a `problem`.
    """
    run_folders: dict[Path, Path] = {}
    for root in map(Path, folders):
        run_folders_below = list(_find_run_folders(root))
        if not run_folders_below:
            reason = "holds no run (summary.json or .hydra)" if root.is_dir() else "is not a folder"
            raise ValueError(f"{root} {reason}; give a run folder, or a folder of run folders")
        for folder in run_folders_below:
            run_folders.setdefault(folder.resolve(), folder)
    rows = [_read_run(folder) for folder in run_folders.values()]
    names = dict.fromkeys([*RUN_COLUMNS, *(name for row in rows for name in row)])
    runs = pd.DataFrame([[row.get(name) for name in names] for row in rows], columns=list(names), dtype=object)
    runs["started"] = pd.to_datetime(runs["started"].astype("string"), utc=True, errors="coerce", format="ISO8601")
    numeric = [name for name in names if "/" in name]
    others = runs.drop(columns=numeric).convert_dtypes()
    mixed = others.select_dtypes("object").columns.difference(["simplifications"])  # columns of several types: text
    return pd.concat([others.astype(dict.fromkeys(mixed, "string")), runs[numeric].astype(float)], axis=1)


def load_metrics(folder: str | Path) -> pd.DataFrame:
    """Load the metrics.jsonl of a run folder, one row a line, indexed by `update`; what a line lacks is NaN.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
        ValueError: a line is no row of numbers. A last line that is half-written is left out instead.
    """
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return pd.DataFrame(rows, columns=None if rows else ["update"]).set_index("update")


def setting_columns(runs: pd.DataFrame) -> list[str]:
    """Names of the columns of `load_runs` that hold settings."""
    return [name for name in runs if "/" not in name and name not in RUN_COLUMNS]


def metric_columns(runs: pd.DataFrame) -> list[str]:
    """Names of the columns of `load_runs` that hold metrics, without the paper's."""
    return [name for name in runs if "/" in name and not name.startswith("paper: ")]


def _find_run_folders(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        logged = "run.log" in files and os.path.getsize(os.path.join(folder, "run.log")) > 0
        if ".hydra" in subfolders or "summary.json" in files or logged:
            yield Path(folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def _read_run(folder: Path) -> dict[str, Any]:
    """One row of `load_runs`. Whatever lies in the folder, the other runs still make a table."""
    row: dict[str, Any] = {"folder": str(folder), "finished": False, "problem": ""}
    try:
        check_regular(folder)
        summary = _read_summary(folder)
        row |= {name: str(summary[name]) for name in ("task", "model", "metric")}
        row |= {name: summary.get(name) for name in ("commit", "dirty", "started")}
        row |= {"seed": summary["protocol"].get("seed"), "finished": bool(summary["finished"])}
        row["far_behind"] = "; ".join(summary.get("far_behind") or [])
        row["simplifications"] = [str(note) for note in summary.get("simplifications") or []]
        if not row["finished"]:
            raise ValueError(f"unfinished{_last_update(folder)}")
        paper = {f"paper: {name}": value for name, value in (summary.get("paper") or {}).items()}
        metrics = {name: value for name, value in (summary["metrics"] | paper).items() if value is not None}
        if not all(math.isfinite(value) for value in metrics.values()):
            raise ValueError("summary.json has metrics that are not finite numbers")
        sections = {name: summary.get(name) or {} for name in ("protocol", "data", "trained")}
        settings = dict(_flatten(_read_config(folder, summary) | sections))
        settings["evaluate"] = "another run" if settings.get("evaluate") else None
        for name, value in (settings | row).items():
            if name != "simplifications" and not _fits_into_a_cell(value):
                raise ValueError(f"{name} is neither a text nor a number of at most 64 bits: {str(value)[:40]}")
        return settings | metrics | row
    except Exception as error:
        reason = str(error).partition("\n")[0]
        problem = reason if type(error) is ValueError else f"unreadable: {type(error).__name__}: {reason}"
        readable = {name: value for name, value in row.items() if _fits_into_a_cell(value)}
        return readable | {"problem": problem, "simplifications": row.get("simplifications", [])}


def _fits_into_a_cell(value: Any) -> bool:
    """Whether a table can hold a value: a text, or a number of at most 64 bits."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or isinstance(value, str | float)


def _read_summary(folder: Path) -> dict[str, Any]:
    if not (folder / "summary.json").exists():
        raise ValueError(f"no summary.json: stopped, failed or still running{_last_update(folder)}")
    summary = read_summary(folder)
    if "format" not in summary and {"measure", "figures"} & set(summary):
        raise ValueError("written by expire-span 0.1, whose names have changed: read it with that version")
    if missing := REQUIRED - set(summary):
        raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
    if summary["format"] != FORMAT:
        raise ValueError(f"summary.json has format {summary['format']}; this version reads format {FORMAT}")
    return summary


def _last_update(folder: Path) -> str:
    metrics, log = folder / "metrics.jsonl", folder / "run.log"
    rows = read_metrics(metrics) if metrics.exists() else []
    errors = re.findall(r"\[ERROR\] (.*)", log.read_text(errors="replace")) if log.exists() else []
    last = f", last logged update {rows[-1].get('update')}" if rows else ", nothing logged"
    return last + "".join(f"; {error}" for error in errors[-1:])


def _read_config(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The config of the summary, or else of .hydra, without NO_SETTINGS and the section of Hydra."""
    if summary.get("config"):
        return {key: value for key, value in summary["config"].items() if key not in NO_SETTINGS}
    config = cast(DictConfig, OmegaConf.load(folder / ".hydra/config.yaml"))
    for key in (*NO_SETTINGS, "hydra"):
        config.pop(key, None)  # before resolving: these refer to a running Hydra
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values: {"a": {"b": 1}} -> ("a.b", 1). Slashes, which mark metrics, become colons."""
    for key, value in tree.items():
        name = prefix + str(key).replace("/", ":")
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, json.dumps(value) if isinstance(value, list) else value
