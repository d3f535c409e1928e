"""Averages of metrics over a logging interval or an evaluation."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, float]


class MetricAverager:
    """Collects metrics by name. Tensors stay on their device until they are read, and are then copied all at once."""

    def __init__(self) -> None:
        self.values_by_name: dict[str, list[Any]] = defaultdict(list)

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one value of each metric, a number or a scalar tensor."""
        for name, value in metrics.items():
            self.values_by_name[name].append(value)

    def values(self) -> dict[str, list[float]]:
        """All values added so far, as numbers."""
        for name, values in self.values_by_name.items():
            tensors = [value for value in values if isinstance(value, Tensor)]
            if tensors:
                numbers = iter(torch.stack([tensor.detach().float() for tensor in tensors]).tolist())
                self.values_by_name[name] = [next(numbers) if isinstance(value, Tensor) else value for value in values]
        return dict(self.values_by_name)

    def load_values(self, values: dict[str, list[float]]) -> None:
        """Restore values that a checkpoint saved."""
        self.values_by_name.update({name: list(numbers) for name, numbers in values.items()})

    def pop_means(self) -> Metrics:
        """The mean of each metric, without its NaNs (NaN if there is nothing else); then forgets all values."""
        means = {}
        for name, values in self.values().items():
            numbers = [value for value in values if not math.isnan(value)]
            means[name] = sum(numbers) / len(numbers) if numbers else math.nan
        self.values_by_name.clear()
        return means


class RunningMeans:
    """Means of metrics over any number of blocks: the values are summed up from time to time, and not kept."""

    BLOCKS_PER_SUM = 64  # each sum copies values from the device

    def __init__(self) -> None:
        self.recent = MetricAverager()
        self.blocks = 0
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Add one value of each metric, a number or a scalar tensor."""
        self.recent.add(metrics)
        self.blocks += 1
        if self.blocks % self.BLOCKS_PER_SUM == 0:
            self.sum_up()

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
