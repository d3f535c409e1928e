"""Rows of the paper's tables: their settings, and their runs in RUNS/SIZE/PRESET/seedN."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from .results import load_runs
from .runner.config.overrides import parse
from .runner.config.sections import add_new_keys
from .runner.run_folder.files import read_summary
from .runner.run_folder.identity import changes, is_below
from .runner.run_folder.summary import NO_SETTINGS

CONF = files("expire_span.conf")
# What may differ between a run and its row: names, where things lie, and settings that change no result.
NOT_OF_ROW = ("seed", "task.seed", "task.path", "task.data_dir", "evaluate", "resume", "experiment", "run")
DIVERGED = "try a lower optimizer.lr"  # in the error of every training that has diverged


class Row(NamedTuple):
    """A row of a table: settings, and the seeds that it is run with."""

    preset: str  # the name of the settings, of their run folders, and of the group in W&B
    title: str
    overrides: tuple[str, ...]  # what `expire-span` is told to run it; none: not known yet
    paper: dict[str, float]  # the paper's numbers, by metric
    seeds: tuple[int, ...]
    is_curve: bool = False  # whether it is a point of a curve, and not a preset


def preset_name(preset: str, size: str) -> str:
    """What `experiment=` calls a preset at a size."""
    return preset if size == "paper" else f"{size}/{preset}"


def paper_numbers(preset: str) -> dict[str, float]:
    """The paper's own numbers for a preset, by metric."""
    return dict(read_preset(preset).get("paper") or {})


def preset_content(overrides: Sequence[str]) -> dict[str, Any]:
    """The content of a preset that does what these overrides do, of which the first may name another preset."""
    content = OmegaConf.create({"defaults": []})
    for override in map(parse, overrides):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            content = read_preset(str(value))
        elif key in ("task", "model", "size"):
            content.defaults.append({f"override /{key}": value})
        else:
            OmegaConf.update(content, key, value)
    return cast(dict[str, Any], OmegaConf.to_container(content))


def read_preset(name: str) -> DictConfig:
    """A file of conf/experiment."""
    return cast(DictConfig, OmegaConf.create((CONF / "experiment" / f"{name}.yaml").read_text()))


def row_config(overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides compose: the groups by Hydra, then the other keys, as Hydra sets them."""
    parsed = [(override, parse(override)) for override in overrides]
    groups = [override for override, key in parsed if key.key_or_group in ("experiment", "task", "model", "size")]
    config = composed(tuple(groups)).copy()
    for override, key in parsed:
        if override not in groups:
            OmegaConf.update(config, key.key_or_group, key.value())
    return config


@cache
def composed(groups: tuple[str, ...]) -> DictConfig:
    """A config of these choices of groups. Composing takes long, and many rows differ in other keys only."""
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        return compose("config", overrides=list(groups))


def load_row(row: Row, size: str, runs: Path) -> pd.DataFrame:
    """The runs of a row, as `load_runs` gives them; one that has other settings or another seed has a `problem`."""
    try:
        found = load_runs(runs / size / row.preset)
    except ValueError:  # there is no run
        return pd.DataFrame({"folder": [], "problem": []})
    for index, run in found[found["problem"] == ""].iterrows():
        is_of_row = run["seed"] in row.seeds
        problem = other_settings(row, Path(run["folder"])) if is_of_row else f"no seed of this table: {run['seed']}"
        found.loc[index, "problem"] = problem
    return found


def other_settings(row: Row, folder: Path) -> str:
    """What a finished run has other than its row, whose preset has changed since; empty if it is nothing."""
    saved = read_summary(folder).get("config")
    if not saved or not row.overrides:
        return ""
    config, saved = row_config(row.overrides), add_new_keys(saved)
    OmegaConf.set_struct(config, False)
    for section in ("hydra", *NO_SETTINGS):
        config.pop(section, None)  # which may refer to a running Hydra
        saved.pop(section, None)
    now = OmegaConf.to_container(config, resolve=True)
    differing = {
        key.rpartition(".")[2]: f"{key} was {old} and is {new} now"  # by the last part: model.alpha is memory.alpha
        for key, old, new in changes(saved, now)
        if not is_below(key, NOT_OF_ROW)
    }
    advice = "; move its folder away, and the same command runs it anew"
    return f"its settings are no longer those of the row: {', '.join(differing.values())}{advice}" if differing else ""


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds the result of a run."""
    try:
        return bool(read_summary(folder)["finished"])
    except (KeyError, OSError, ValueError):
        return False


def has_diverged(folder: Path) -> bool:
    """Whether a run has ended because it diverged, as it would do again."""
    try:
        errors = re.findall(r"\[ERROR\] (.*)", (folder / "run.log").read_text(errors="replace"))
    except OSError:
        return False
    return bool(errors) and DIVERGED in errors[-1]


def is_over(folder: Path) -> bool:
    """Whether there is nothing more to run in a folder."""
    return is_finished(folder) or has_diverged(folder)


def missing_seeds(row: Row, size: str, runs: Path) -> tuple[int, ...]:
    """The seeds of a row that are still to be run."""
    return tuple(seed for seed in row.seeds if not is_over(runs / size / row.preset / f"seed{seed}"))
