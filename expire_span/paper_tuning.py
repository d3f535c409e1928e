"""Tuning that gives every model the same budget.

conf/tuning/MODEL.yaml has the factors by which a row's learning rate and one key of the model's own are multiplied. All
combinations are run with one seed, which no table uses; the one that is best on the validation split is then run with
the row's seeds, and the table tells the test.

    RUNS/SIZE/tuning/PRESET/lr_0.001_alpha_0.01/seed0     a point of the tuning
    RUNS/SIZE/tuned/PRESET/lr_0.001_alpha_0.01/seedN      the chosen point, with the seeds of the table
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf

from expire_span.tasks.base import LOWER_IS_BETTER

from .paper_rows import CONF, Row, has_diverged, load_row, preset_content, row_config
from .runner.commands.report import format_number

SEED = 0
RATE = "optimizer.lr"


class Choice(NamedTuple):
    """What the tuning of a row gave."""

    row: Row  # with the chosen settings and the row's own seeds; without overrides while a point is missing
    settings: dict[str, str]  # the chosen ones; empty while a point is missing
    metric: str  # what they were chosen by
    value: float
    finished: int  # points
    points: int
    left_out: list[str]  # runs of points that have not finished, with the reason


def factors(model: str, is_curve: bool) -> dict[str, list[float]]:
    """The factors of each key that is tuned for a model. Raises ValueError for a model without a file of them."""
    path = CONF / "tuning" / f"{model}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no tuning for {model}: write conf/tuning/{model}.yaml, as there is for the others")
    content: dict[str, list[float]] = yaml.safe_load(path.read_text())
    return {key: values for key, values in content.items() if key == RATE or not is_curve}


def points(row: Row) -> list[Row]:
    """The rows that the tuning of a row runs."""
    config = row_config(row.overrides)
    tried = {
        key: list(dict.fromkeys(multiplied(value_of(config, key), factor) for factor in of_key))
        for key, of_key in factors(model_option(row), row.is_curve).items()
    }
    rows = []
    for values in itertools.product(*tried.values()):
        overrides = tuple(f"{key}={value}" for key, value in zip(tried, values, strict=True))
        rows.append(
            Row(f"tuning/{row.preset}/{point_name(overrides)}", row.title, (*row.overrides, *overrides), {}, (SEED,))
        )
    return rows


def point_name(overrides: Sequence[str]) -> str:
    """A name by the values, so that more of them may be added later."""
    return "_".join(re.sub(r".*\.(\w+)=", r"\1_", override) for override in overrides)


def model_option(row: Row) -> str:
    """What `model=` calls the model of a row."""
    groups = [group for group in preset_content(row.overrides)["defaults"] if "override /model" in group]
    return str(groups[0]["override /model"])


def value_of(config: DictConfig, key: str) -> float:
    """A number of a composed config. Raises ValueError if there is none."""
    value: Any = OmegaConf.select(config, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"conf/tuning: {key} is not a number of {config.model._target_} here, but {value}")
    return value


def multiplied(value: float, factor: float) -> float:
    """Whole numbers stay whole, and do not become 0."""
    if isinstance(value, int):
        return max(1, round(value * factor))
    return float(f"{value * factor:.6g}")


def choose(row: Row, tried: Sequence[Row], size: str, runs: Path) -> Choice:
    """Choose the best of the points of a row, on the validation split, from run folders alone.

    While a point is missing nothing is chosen: the row would have had fewer points than others. A point that has
    diverged counts as tried.

    Raises:
        ValueError: if the runs have no metric of the validation split.
    """
    found = pd.concat([load_row(point, size, runs).assign(point=number) for number, point in enumerate(tried)])
    finished, others = found[found["problem"] == ""], found[found["problem"] != ""]
    left_out = [f"{run.folder}: {run.problem}".replace(f"{runs}/", "") for run in others.itertuples()]
    over = {*finished["point"], *(run.point for run in others.itertuples() if has_diverged(Path(run.folder)))}
    if len(over) < len(tried) or finished.empty:
        chosen = row._replace(preset=f"tuned/{row.preset}/none", overrides=())
        return Choice(chosen, {}, "", float("nan"), len(finished), len(tried), left_out)
    own = finished["metric"].iloc[0]
    metric = next((name for name in (f"valid/{own}", f"valid/rl/{own}") if name in finished), "")
    if not metric:
        raise ValueError(f"{runs / size / tried[0].preset} has no valid/{own}: tuning needs valid in eval.splits")
    order = finished.sort_values(metric, ascending=own in LOWER_IS_BETTER, kind="stable")
    number = order["point"].iloc[0]
    best = tried[number]
    values = [dict(override.split("=", 1) for override in point.overrides[len(row.overrides) :]) for point in tried]
    settings = {key: with_place(value, [point[key] for point in values]) for key, value in values[number].items()}
    chosen = row._replace(
        preset=f"tuned/{row.preset}/{point_name(best.overrides[len(row.overrides) :])}", overrides=best.overrides
    )
    return Choice(chosen, settings, metric, order[metric].iloc[0], len(finished), len(tried), left_out)


def with_place(value: str, tried: Sequence[str]) -> str:
    """A chosen value, and whether it is the lowest or the highest of several tried: one beyond may be better."""
    numbers = sorted({float(other) for other in tried})
    ends = {numbers[0]: " (lowest tried)", numbers[-1]: " (highest tried)"} if len(numbers) > 2 else {}
    return f"{format_number(float(value))}{ends.get(float(value), '')}"


def describe(choices: Sequence[Choice]) -> str:
    """What was tried and chosen, in Markdown."""
    rows = [
        {
            "": choice.row.title,
            "points": f"{choice.finished} of {choice.points}" if choice.finished < choice.points else choice.points,
            **choice.settings,
            **({f"best {choice.metric}": format_number(choice.value)} if choice.settings else {}),
        }
        for choice in choices
    ]
    text = (
        f"Tuning: every row has the same number of points, each run with seed {SEED}. When all of them are there, the "
        "best on the validation split is run anew with the seeds of the table, whose results are those of the test "
        "split."
    )
    table = pd.DataFrame(rows).fillna("").to_markdown(index=False, tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"- Not finished: {text}" for choice in choices for text in choice.left_out)
    return "\n\n".join(filter(None, [text, table, notes]))
