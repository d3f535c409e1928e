"""What a recipe's training metric should read on the way, so that a run that does not learn is noticed early.

A recipe's `milestones` are {percent of the updates: value}, from runs of that recipe (scripts/milestones.py): the mean
of the metric over the tenth of the updates that ends there, since one logging interval tells little in a curriculum. A
run is far behind where it is more than a third worse: below 2/3 of the value, or above 3/2 where less is better.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from expire_span.tasks.base import LOWER_IS_BETTER, RLTask

from .config.overrides import is_below, parse
from .config.value_sources import marked_values, read_first
from .run_folder.identity import MAY_CHANGE

PERCENTAGES = (10, 25, 50, 100)
SAME_RECIPE = (*(key for key in MAY_CHANGE if key != "train.updates"), "hydra", "seed", "task.seed")


def is_plain_recipe(overrides: Sequence[str], choices: Mapping[str, str | None], folders: Sequence[str]) -> bool:
    """Whether a command line runs an unmodified recipe with Expire-Span, for which the milestones were measured.

    Args:
        overrides: Those of the command line.
        choices: The option chosen in each config group.
        folders: Where the group's files are searched: paths, or pkg://MODULE.
    """
    keys = [override.key_or_group for override in map(parse, overrides)]
    chosen = {key for key in keys if not is_below(key, SAME_RECIPE) and "hydra/" not in key}
    if chosen - {"task", "size", "model", "experiment"} or choices.get("model") != "expire_span":
        return False
    preset, recipe = (
        read_first(folders, f"{group}/{choices[group]}.yaml") if choices.get(group) else ""
        for group in ("experiment", "recipe")
    )
    return values_of(preset or "") <= values_of(recipe or "")


def values_of(text: str) -> set[tuple[str, str]]:
    """The keys and values that a file of settings has, without what says only where they are from."""
    return {(key, value) for key, value, _ in marked_values(text) if not is_below(key, ("defaults", "paper"))}


def training_metric(task: Any) -> str:
    """The name of the task's own metric in the rows of a training."""
    return f"{'rl' if isinstance(task, RLTask) else 'train'}/{task.metric}"


def mean_before(update: int, num_updates: int, metric: str, rows: Sequence[Mapping[str, float]]) -> float | None:
    """The mean of a metric over the tenth of the updates that ends at this one (None: nothing is logged there)."""
    values = [row[metric] for row in rows if update - num_updates / 10 < row["update"] <= update and metric in row]
    return statistics.fmean(values) if values else None


def milestone_updates(config: DictConfig) -> dict[int, float]:
    """{update: expected value}, in order."""
    return {config.train.updates * percent // 100: value for percent, value in sorted(config.milestones.items())}


def expectation(config: DictConfig, task: Any) -> str:
    """What the run's start says of its milestones; empty if it has none."""
    expected = [f"{value:g} at update {update}" for update, value in milestone_updates(config).items()]
    return f"{training_metric(task)} should be about {', '.join(expected)}" if expected else ""


def far_behind(config: DictConfig, task: Any, rows: Sequence[Mapping[str, float]], since: int = 0) -> list[str]:
    """The milestones that a run has missed by far.

    Args:
        rows: The rows of metrics.jsonl.
        since: Only milestones after this update.
    """
    metric, messages = training_metric(task), []
    for update, expected in milestone_updates(config).items():
        value = mean_before(update, config.train.updates, metric, rows)
        if value is None or not since < update <= max(row["update"] for row in rows):
            continue
        if value > 3 / 2 * expected if task.metric in LOWER_IS_BETTER else value < 2 / 3 * expected:
            messages.append(f"{metric} is {value:.3g} at update {update}, where this recipe had {expected:g}")
    return messages
