"""Averages of metrics over a logging interval or an evaluation.

Ranks and micro-batches each add their share of a metric: of a mean over all streams, the mean over their own ones times
these streams' part in all of them. So the shares of all ranks and micro-batches add up to the metric.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ...memory.metrics import accurate_dtype
from .. import ranks

Metrics = dict[str, float]


class MetricAverager:
    """Collects metrics by name. Tensors stay on their device until they are read, and are then copied all at once."""

    def __init__(self) -> None:
        self.numbers_by_name: dict[str, list[float]] = defaultdict(list)  # of all ranks
        self.recent: dict[str, list[Any]] = defaultdict(list)  # shares of this rank that were not yet read

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one value of each metric, a number or a scalar tensor: this rank's share of it."""
        for name, value in metrics.items():
            self.recent[name].append(value)

    def add_share(self, metrics: dict[str, Any], share: float, is_first: bool = True) -> None:
        """Add one micro-batch's means over its streams; those after the first add to the value of the first one."""
        for name, value in metrics.items():
            if share != 1:
                value = share * (value.to(accurate_dtype(value)) if isinstance(value, Tensor) else value)
            if is_first:
                self.recent[name].append(value)
            else:
                self.recent[name][-1] = self.recent[name][-1] + value

    def values(self) -> dict[str, list[float]]:
        """All values added so far, as numbers, summed over the ranks. All ranks must call this at the same time."""
        shares = [value for values in self.recent.values() for value in values]
        numbers = iter(ranks.sum_numbers(to_numbers(shares)) if shares else [])
        for name, values in self.recent.items():
            self.numbers_by_name[name] += [next(numbers) for _ in values]
        self.recent.clear()
        return dict(self.numbers_by_name)

    def load_values(self, values: dict[str, list[float]]) -> None:
        """Restore values that a checkpoint saved."""
        self.numbers_by_name.update({name: list(numbers) for name, numbers in values.items()})

    def pop_means(self) -> Metrics:
        """The mean of each metric, without its NaNs (NaN if there is nothing else); then forgets all values."""
        means = means_without_nan(self.values())
        self.numbers_by_name.clear()
        return means

    def pop_own_means(self) -> Metrics:
        """The same, of this rank alone: its share of the means."""
        values = {name: to_numbers(shares) for name, shares in self.recent.items()}
        self.recent.clear()
        return means_without_nan(values)


def means_without_nan(values_by_name: dict[str, list[float]]) -> Metrics:
    means = {}
    for name, values in values_by_name.items():
        numbers = [value for value in values if not math.isnan(value)]
        means[name] = sum(numbers) / len(numbers) if numbers else math.nan
    return means


def to_numbers(values: list[Any]) -> list[float]:
    """Numbers and scalar tensors as numbers; the device is waited for once."""
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return values
    numbers = iter(torch.stack([tensor.to(accurate_dtype(tensor)) for tensor in tensors]).tolist())
    return [next(numbers) if isinstance(value, Tensor) else value for value in values]


class RunningMeans:
    """Means of metrics over any number of blocks: the values are summed up from time to time, and not kept."""

    BLOCKS_PER_SUM = 64  # each sum copies values from the device

    def __init__(self) -> None:
        self.recent = MetricAverager()
        self.blocks = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one value of each metric, a number or a scalar tensor: this rank's share of it."""
        self.add_share(metrics, 1)

    def add_share(self, metrics: dict[str, Any], share: float, is_first: bool = True) -> None:
        """As in `MetricAverager`."""
        if is_first:
            if self.blocks and self.blocks % self.BLOCKS_PER_SUM == 0:
                self.sum_up()
            self.blocks += 1
        self.recent.add_share(metrics, share, is_first)

    def sum_up(self) -> None:
        for name, values in self.recent.values().items():
            numbers = [value for value in values if not math.isnan(value)]
            self.sums[name] = sum(numbers, start=self.sums.get(name, 0.0))
            self.counts[name] = self.counts.get(name, 0) + len(numbers)
        self.recent = MetricAverager()

    def means(self) -> Metrics:
        """The mean of each metric, without its NaNs (NaN if there is nothing else)."""
        self.sum_up()
        return {name: total / self.counts[name] if self.counts[name] else math.nan for name, total in self.sums.items()}
