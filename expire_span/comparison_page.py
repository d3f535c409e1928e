"""A page that compares runs in a browser, without a network or an account: `expire-span-report RUN... --html FILE`

Python puts the data of the runs, plotly.js and the script beside this module into one file. What depends on the filters
(means, spreads, colors) is computed in the browser, by comparison_page.js. plotly.js adds 4.6 MB to the page: its
hover, zoom, legends and export of pictures would otherwise be more code of our own than all the rest.
"""

import json
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .results import load_metrics, metric_columns
from .runner.commands.report import costs, distinguishing_settings, footnotes, group_seeds, result_metrics

MAX_POINTS = 400  # of a curve
DIGITS = 6  # of a point of a curve
NO_CURVES: dict[str, Any] = {"axes": [], "curves": {}}


def comparison_page(runs: pd.DataFrame) -> str:
    """The page as HTML: the table of the report, quality against cost, and learning curves, with filters for all three.

    Args:
        runs: from `load_runs`. The curves are read from the metrics.jsonl of their folders.

    Raises:
        ValueError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ValueError("--html needs plotly: pip install 'expire-span[plots]'") from error
    folder = files("expire_span")
    parts = {
        "PLOTLY": get_plotlyjs(),
        "DATA": script_json(page_data(runs)),
        "SCRIPT": folder.joinpath("comparison_page.js").read_text(encoding="utf-8"),
    }
    page = folder.joinpath("comparison_page.html").read_text(encoding="utf-8")
    return re.sub("{{(PLOTLY|DATA|SCRIPT)}}", lambda place: parts[place[1]], page)


def page_data(runs: pd.DataFrame) -> dict[str, Any]:
    """What the page shows.

    Keys:
        settings, results, costs: names of the columns of its table, each group's settings as in the report.
        groups: task, model, metric of the task, settings and footnotes of the rows of the report, in its order.
        runs: of each run in a group: folder, seed, group (its place in `groups`), final metrics, tokens_per_update,
            and what `load_curves` gives. The metrics have each cost under its bare name, too, as the report shows it.
        problems: folder and problem of each run that is in no group, or whose curves cannot be read.
        max_points: the most points that a curve has.
    """
    groups, left_out = group_seeds(runs)
    members = groups.obj
    settings = [*distinguishing_settings(groups), "protocol.updates"] if len(members) else []
    results = [column for name in result_metrics(members) for column in (name, f"paper: {name}") if column in runs]
    member_costs, metrics = costs(members), [*metric_columns(runs), *results]
    shown_groups, shown_runs, problems = [], [], left_out[["folder", "problem"]].to_dict("records")
    rows = groups[["task", "model", *settings]].first().sort_values(["task", "model", *settings])
    for place, number in enumerate(rows.index):
        group = groups.get_group(number)
        names = {name: group[name].iloc[0] for name in ("task", "model", "metric")}
        values = {name: _plain(rows.loc[number, name]) for name in settings}
        shown_groups.append(names | {"settings": values, "notes": footnotes(group)})
        for run, run_costs in zip(group.to_dict("records"), member_costs.loc[[number]].to_dict("records"), strict=True):
            final = {name: run[name] for name in metrics} | run_costs
            tokens = _tokens_per_update(run)
            try:
                curves = load_curves(run["folder"], tokens)
            except Exception as error:  # whatever lies in the folder, the other runs are shown
                problem = "no learning curves: " + str(error).partition("\n")[0]
                problems.append({"folder": run["folder"], "problem": problem})
                curves = NO_CURVES
            shown_runs.append(
                {"folder": run["folder"], "seed": _plain(run["seed"]), "group": place, "tokens_per_update": tokens}
                | {"metrics": {name: value for name, value in final.items() if pd.notna(value)}}
                | curves
            )
    return {
        "settings": settings,
        "results": results,
        "costs": list(member_costs),
        "groups": shown_groups,
        "runs": shown_runs,
        "problems": problems,
        "max_points": MAX_POINTS,
    }


def load_curves(folder: str | Path, tokens_per_update: float | None) -> dict[str, Any]:
    """Load the learning curves of a run, each of at most MAX_POINTS points, the first and the last among them.

    Of two values for one update the first counts: the second is the final row's, a median over the training.

    Returns:
        `axes`: the updates that curves have values at, and the hours of training until then, as logged in
        perf/tokens_per_second (none: null). `curves`: for each metric, the place of its axis, and its values.
    """
    if not (Path(folder) / "metrics.jsonl").exists():  # an evaluation of another run has none
        return NO_CURVES
    metrics = load_metrics(folder).replace([math.inf, -math.inf], math.nan).groupby(level=0).first()
    hours = training_hours(metrics, tokens_per_update)
    places: dict[tuple[int, ...], int] = {}  # of the axes; curves with values for the same updates share one
    curves = {}
    for name, column in metrics.items():
        known = np.flatnonzero(column.notna())
        if len(known) > MAX_POINTS:
            known = known[np.linspace(0, len(known) - 1, MAX_POINTS).round().astype(int)]
        if len(known):
            curves[name] = [places.setdefault(tuple(known), len(places)), _rounded(column.iloc[known])]
    axes = []
    for rows in map(list, places):
        axes.append({"update": metrics.index[rows].tolist(), "hours": None if hours is None else _rounded(hours[rows])})
    return {"axes": axes, "curves": curves}


def training_hours(metrics: pd.DataFrame, tokens_per_update: float | None) -> np.ndarray | None:
    """Hours of training until each row of metrics, by update; None if the speed is not logged."""
    speed = metrics.get("perf/tokens_per_second", pd.Series(dtype=float)).dropna()
    if tokens_per_update is None or speed.empty or not (speed > 0).all():
        return None
    seconds = np.diff(speed.index, prepend=0) * tokens_per_update / speed
    hours = np.interp(metrics.index, [0, *speed.index], [0, *seconds.cumsum() / 3600])
    return hours if np.isfinite(hours).all() else None


def script_json(data: Any) -> str:
    """JSON for the inside of a script element: no text in it can end the element, or begin a comment in it."""
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(data, allow_nan=False))


def _plain(value: Any) -> Any:
    """A cell of a table as JSON can hold it: missing values are null, infinite ones text."""
    if pd.isna(value):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _tokens_per_update(run: dict[str, Any]) -> float | None:
    try:
        return _plain(run["protocol.tokens"] / run["protocol.updates"])
    except (KeyError, TypeError, ZeroDivisionError):  # a summary that somebody else has written
        return None


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
