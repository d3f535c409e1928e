"""Means of metrics: over an interval, whose values are kept, and over an evaluation, whose values are not."""

import gc
import math

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.logging.metrics import MetricAverager, RunningMeans
from expire_span.runner.trainer import Trainer


def test_running_means_are_those_of_the_values_without_nan():
    generator = torch.Generator().manual_seed(0)
    kept, running = MetricAverager(), RunningMeans()
    for block in range(1000):
        value = torch.rand((), generator=generator)
        metrics = {"tensor": value, "number": 0.1 * block, "never": math.nan}
        if block % 3 == 0:
            metrics |= {"tensor": torch.tensor(math.nan), "seldom": value}
        kept.add(metrics)
        running.add(metrics)
    expected, means = kept.pop_means(), running.means()
    assert math.isnan(means.pop("never"))
    assert math.isnan(expected.pop("never"))
    assert means == pytest.approx(expected, rel=1e-14)


def test_evaluation_keeps_no_more_tensors_after_many_blocks_than_after_few(folder):
    trainer = Trainer(tiny_config("task.num_eval_episodes=99", "eval.max_blocks=100"), folder)
    block, num_tensors = 0, {}

    def count(*_):
        nonlocal block
        block += 1
        if block in (30, 30 + RunningMeans.BLOCKS_PER_SUM):
            gc.collect()
            num_tensors[block] = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    trainer.model.register_forward_hook(count)
    trainer.objective.evaluate(trainer.model, trainer.task, "valid", trainer.config, trainer.device)
    few, many = num_tensors.values()
    assert many <= few
