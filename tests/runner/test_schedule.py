"""Rates and the weight of the span loss, update by update."""

import pytest
import torch
from tiny import tiny

from expire_span.runner.loop import train, train_update
from expire_span.runner.record import read_metrics
from expire_span.runner.schedule import alpha_factor, rate_factor
from expire_span.runner.training import Training


def factors(config):
    return [rate_factor(update, config.train.updates, config.schedule) for update in range(config.train.updates)]


def test_the_rate_warms_up_stays_and_ends_at_a_tenth():
    config = tiny("train.updates=10", "schedule.warmup=4", "schedule.final_updates=3")
    assert factors(config) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_a_cosine_falls_from_1_to_0_by_halves():
    config = tiny("train.updates=9", "schedule.warmup=1", "schedule.shape=cosine")
    falling = factors(config)[1:]
    assert falling[0] == 1
    assert falling[4] == pytest.approx(0.5)
    assert falling == sorted(falling, reverse=True)


def test_alpha_is_0_until_its_start_and_then_grows():
    config = tiny("schedule.alpha_start=2", "schedule.alpha_warmup=4")
    weights = [alpha_factor(update, config.schedule) for update in range(8)]
    assert weights == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert alpha_factor(0, tiny().schedule) == 1


@pytest.mark.parametrize("start", [0, 100])
def test_spans_are_pulled_down_by_alpha_alone_where_the_task_says_nothing(start, tmp_path):
    quiet = ["model.init=0.2", "memory.alpha=1.0", "optimiser.lr=0.01", f"schedule.alpha_start={start}"]
    training = Training(tiny(*quiet, "schedule.warmup=0"), tmp_path)
    for parameter in training.model.output.parameters():
        parameter.requires_grad_(False).zero_()  # so no gradient comes from the task
    before = training.model.mechanisms[0].bias.item()
    for _ in range(3):
        train_update(training)
    after = training.model.mechanisms[0].bias.item()
    assert after < before if start == 0 else after == before


def test_the_spans_have_a_rate_of_their_own(tmp_path):
    training = Training(tiny("schedule.span_factor=0.5", "optimiser.lr=0.1"), tmp_path)
    assert [group["full_lr"] for group in training.optimiser.param_groups] == [0.1, 0.05]
    spans = {id(parameter) for mechanism in training.model.mechanisms for parameter in mechanism.parameters()}
    assert {id(parameter) for parameter in training.optimiser.param_groups[1]["params"]} == spans


def test_any_optimiser_of_torch_trains(tmp_path):
    figures = train(tiny("optimiser._target_=torch.optim.RMSprop", "optimiser.lr=1e-4"), tmp_path)
    assert torch.tensor(figures["test/loss"]).isfinite()


def test_the_validation_split_is_evaluated_on_the_way(tmp_path):
    train(tiny("evaluation.every=2", "train.updates=4"), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["update"] for row in rows if "valid/accuracy" in row] == [2, 4, 4]
    assert [row["update"] for row in rows if "test/accuracy" in row] == [4]
