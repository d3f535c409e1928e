"""Means over seeds and their differences, and what these show of the paper's claims."""

import math
from typing import NamedTuple

import pandas as pd

from expire_span.tasks.base import LOWER_IS_BETTER

from .paper_tables import scaled
from .runner.commands.report import format_number

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN = "shown", "not shown", "contradicted", "not run"
LEVEL = 0.95


class Finding(NamedTuple):
    """What one check found."""

    text: str
    verdict: str


class Sample(NamedTuple):
    """A mean over seeds and its uncertainty."""

    mean: float
    variance: float  # of the mean
    degrees: float  # of freedom; 0: one seed
    seeds: int
    planned: int  # seeds of its row, of which some may have failed

    def __str__(self) -> str:
        return f"{self.seeds} of {self.planned}" if self.seeds < self.planned else str(self.seeds)


def compare(text: str, metric: str, one: Sample | None, other: Sample | None, margin: float = 0) -> Finding:
    """Whether the mean of one sample is better than that of the other, by more than a margin."""
    if one is None or other is None:
        return Finding(text, NOT_RUN)
    sign = -1 if lower_is_better(metric) else 1
    difference, error = sign * (one.mean - other.mean), math.sqrt(one.variance + other.variance)
    numbers = " against ".join(format_number(float(scaled(metric, sample.mean))) for sample in (one, other))
    if not (one.degrees and other.degrees):
        return Finding(f"{text}: {numbers}, one seed", NOT_SHOWN)
    half = half_width(one, other) if error else 0.0
    low, high = difference - half, difference + half
    verdict = SHOWN if low > margin else CONTRADICTED if high < margin else NOT_SHOWN
    interval = f"{format_number(float(scaled(metric, low)), 3)} to {format_number(float(scaled(metric, high)), 3)}"
    return Finding(f"{text}: {numbers}, better by {interval} ({one} and {other} seeds)", verdict)


def half_width(one: Sample, other: Sample) -> float:
    """Half of the interval of a difference of two means (Welch)."""
    from scipy.stats import t

    total = one.variance + other.variance
    degrees = total**2 / (one.variance**2 / one.degrees + other.variance**2 / other.degrees)
    return float(t.ppf((1 + LEVEL) / 2, degrees)) * math.sqrt(total)


def sample(values: pd.Series, planned: int = 0) -> Sample | None:
    """The mean of the seeds; None if there is none."""
    values = values.dropna()
    if values.empty:
        return None
    variance = float(values.var()) / len(values) if len(values) > 1 else 0.0
    return Sample(float(values.mean()), variance, len(values) - 1, len(values), planned)


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better: errors, losses, and all costs."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER or metric.startswith(("perf/", "memory/"))
