"""Learning rates and the weight of the span loss, update by update."""

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.lr_schedule import alpha_multiplier, lr_multiplier
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train, train_step
from expire_span.runner.trainer import Trainer


def lr_multipliers(config):
    num_updates = config.train.updates
    return [lr_multiplier(update, num_updates, config.lr_schedule) for update in range(num_updates)]


def test_the_rate_warms_up_stays_constant_and_ends_at_a_tenth():
    config = tiny_config("train.updates=10", "lr_schedule.warmup_updates=4", "lr_schedule.final_updates=3")
    assert lr_multipliers(config) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.1, 0.1, 0.1])


def test_a_cosine_falls_from_1_to_0_and_is_at_one_half_in_the_middle():
    config = tiny_config("train.updates=9", "lr_schedule.warmup_updates=1", "lr_schedule.name=cosine")
    falling = lr_multipliers(config)[1:]
    assert falling[0] == 1
    assert falling[4] == pytest.approx(0.5)
    assert falling == sorted(falling, reverse=True)


def test_alpha_is_0_until_its_start_and_then_grows_linearly():
    config = tiny_config("alpha_schedule.start_update=2", "alpha_schedule.warmup_updates=4")
    multipliers = [alpha_multiplier(update, config.alpha_schedule) for update in range(8)]
    assert multipliers == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert alpha_multiplier(0, tiny_config().alpha_schedule) == 1


@pytest.mark.parametrize("start_update", [0, 100])
def test_without_a_gradient_from_the_task_alpha_alone_shortens_spans(start_update, tmp_path):
    overrides = ["model.init_span_ratio=0.2", "memory.alpha=1.0", "optimizer.lr=0.01", "lr_schedule.warmup_updates=0"]
    trainer = Trainer(tiny_config(*overrides, f"alpha_schedule.start_update={start_update}"), tmp_path)
    for parameter in trainer.model.output_head.parameters():
        parameter.requires_grad_(False).zero_()  # the task's loss has no gradient now
    before = trainer.model.mechanisms[0].bias.item()
    for _ in range(3):
        train_step(trainer)
    after = trainer.model.mechanisms[0].bias.item()
    assert after < before if start_update == 0 else after == before


def test_span_parameters_have_a_learning_rate_of_their_own(tmp_path):
    trainer = Trainer(tiny_config("lr_schedule.span_lr_factor=0.5", "optimizer.lr=0.1"), tmp_path)
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.1, 0.05]
    span_ids = {id(parameter) for mechanism in trainer.model.mechanisms for parameter in mechanism.parameters()}
    assert {id(parameter) for parameter in trainer.optimizer.param_groups[1]["params"]} == span_ids


def test_the_learning_rate_gradient_norm_and_span_loss_are_logged(tmp_path):
    train(tiny_config("optimizer.lr=0.1", "lr_schedule.warmup_updates=4", "run.log_every=1"), tmp_path)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/lr"] for row in rows] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert all({"train/grad_norm", "train/span_loss"} <= set(row) for row in rows)


def test_any_optimizer_of_torch_trains(tmp_path):
    metrics = train(tiny_config("optimizer._target_=torch.optim.RMSprop", "optimizer.lr=1e-4"), tmp_path)
    assert torch.tensor(metrics["test/loss"]).isfinite()


def test_the_validation_split_is_evaluated_at_the_interval_and_at_the_end(tmp_path):
    train(tiny_config("eval.interval=2", "train.updates=4"), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["update"] for row in rows if "valid/accuracy" in row] == [2, 4, 4]
    assert [row["update"] for row in rows if "test/accuracy" in row] == [4]
