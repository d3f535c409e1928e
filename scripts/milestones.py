"""Print the milestones of a mini recipe, from finished runs of it: the medians of their training metrics.

python scripts/milestones.py RUN [RUN ...]
"""

import statistics
import sys
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from expire_span.runner.config.overrides import is_below
from expire_span.runner.config.schema import validate
from expire_span.runner.milestones import PERCENTAGES, SAME_RECIPE, mean_before, training_metric
from expire_span.runner.run_folder.config_files import load_config
from expire_span.runner.run_folder.files import read_metrics, read_summary
from expire_span.runner.run_folder.identity import changes
from expire_span.runner.trainer import build_task


def milestones(folders: list[Path]) -> dict[int, float]:
    """{percent of the updates: median over the runs}. Raises ValueError for a run of other settings."""
    values: dict[int, list[float]] = {percent: [] for percent in PERCENTAGES}
    for folder in folders:
        config, summary = load_config(folder), read_summary(folder)
        if different := different_settings(config, summary["task"]):
            raise ValueError(f"{folder} is not of the unmodified recipe: {', '.join(different)}")
        if not summary["finished"]:
            raise ValueError(f"{folder} is not finished")
        metric, updates = training_metric(build_task(config)), config.train.updates
        for percent in PERCENTAGES:
            value = mean_before(updates * percent // 100, updates, metric, read_metrics(folder / "metrics.jsonl"))
            if value is None:
                raise ValueError(f"{folder} logs no {metric} in the tenth of its updates that ends at {percent} %")
            values[percent].append(value)
    return {percent: float(f"{statistics.median(numbers):.3g}") for percent, numbers in values.items()}


def different_settings(config: DictConfig, task: str) -> list[str]:
    """The keys in which a run's config is not that of `task=TASK`."""
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        recipe = validate(compose("config", overrides=[f"task={task}"]))
    old, new = (OmegaConf.to_container(each, resolve=True) for each in (recipe, config))
    return [key for key, _, _ in changes(old, new) if not is_below(key, SAME_RECIPE)]


if __name__ == "__main__":
    try:
        print(f"milestones: {milestones([Path(folder) for folder in sys.argv[1:]])}")
    except (OSError, ValueError) as error:
        sys.exit(f"{error}\n\n{__doc__}")
