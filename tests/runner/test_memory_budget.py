"""A memory budget: alpha moves until what is held meets it, from above, and never winds up."""

import math

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.memory_budget import LIMIT, MemoryBudget
from expire_span.runner.train import train_step
from expire_span.runner.trainer import Trainer

RAMP, MAX_SPAN = 16, 256


def held_after(num_updates, budget, alpha, usefulness, init_logit=0.0):
    """What is held of a single span under Adam, where the task's loss is usefulness * exp(-span / 64)."""
    logit = torch.nn.Parameter(torch.tensor(init_logit))
    optimizer, controller, held = torch.optim.Adam([logit], lr=0.05), MemoryBudget(budget), []
    for _ in range(num_updates):
        span = MAX_SPAN * torch.sigmoid(logit)
        loss = usefulness * torch.exp(-span / 64) + controller.scale * alpha * span
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        held.append(span.item() + RAMP)
        controller.step(held[-1], lr_multiplier=1.0)
    return held, controller


@pytest.mark.parametrize("init_logit", [-3.0, 2.0], ids=["from_below", "from_above"])
@pytest.mark.parametrize(("budget", "alpha"), [(24, 1e-3), (60, 1e-2), (120, 1e-3)])
def test_where_the_task_wants_more_memory_the_budget_is_met_within_10_percent(budget, alpha, init_logit):
    held, _ = held_after(1500, budget, alpha, usefulness=1.0, init_logit=init_logit)
    assert all(abs(value / budget - 1) < 0.1 for value in held[-300:])


def test_where_the_task_wants_less_memory_alpha_is_0_and_what_is_held_stays_below():
    held, controller = held_after(200, 120, alpha=1e-3, usefulness=0.0, init_logit=-1.0)
    assert held[-1] == pytest.approx(held[-100], rel=1e-3)  # Adam's momentum is over
    assert held[-1] < 120
    assert controller.scale == 0


def test_alpha_does_not_run_off_while_spans_cannot_shrink_and_stops_a_fall_ahead_of_the_budget():
    controller = MemoryBudget(40)
    for _ in range(10_000):
        controller.step(144, lr_multiplier=1.0)
    assert controller.z < 1  # nothing is on its ramp
    for update in range(10_000):
        controller.step(143 + update % 2, lr_multiplier=1.0)
    assert controller.z == LIMIT
    falling = [144 * 0.92**update for update in range(100)]
    stopped_at = next(held for held in falling if controller.step(held, 1.0) or controller.scale == 0)
    assert 40 < stopped_at < 120
    for update in range(200):
        controller.step(30 + update % 2, lr_multiplier=1.0)
    assert controller.z < LIMIT - 1


def test_the_dual_variable_learns_as_slowly_as_the_weights():
    fast, slow = MemoryBudget(40), MemoryBudget(40)
    for held in (50, 51):
        fast.step(held, lr_multiplier=1.0)
        slow.step(held, lr_multiplier=0.1)
    assert fast.z > 0
    assert slow.z == pytest.approx(0.1 * fast.z)


@pytest.mark.parametrize("model", ["expire_span", "adaptive_span"])
@pytest.mark.parametrize(("budget", "direction"), [(17, 1), (1000, -1)])
def test_alpha_rises_above_its_value_where_too_much_is_held_and_ends_where_there_is_room(
    budget, direction, model, tmp_path
):
    trainer = Trainer(tiny_config(f"model={model}", f"memory.budget={budget}", "model.init_span_ratio=0.9"), tmp_path)
    for _ in range(4):
        train_step(trainer)
    first, *_, last = trainer.averager.values()["train/alpha"]
    assert first == pytest.approx(trainer.config.model.alpha)
    assert last > 2 * first if direction == 1 else last == 0


def test_before_alpha_has_started_nothing_is_learned_from_what_is_held(tmp_path):
    trainer = Trainer(tiny_config("memory.budget=17", "alpha_schedule.start_update=2"), tmp_path)
    train_step(trainer)
    assert trainer.budget == MemoryBudget(17)
    assert trainer.averager.values()["train/alpha"] == [0.0]


def test_what_is_held_is_what_the_metric_says_with_blocks_that_only_fill_the_memory(tmp_path):
    trainer = Trainer(tiny_config("memory.budget=17"), tmp_path)
    train_step(trainer)
    held = trainer.averager.values()["memory/held"]
    assert len(held) > 1  # the curriculum's first episodes are two blocks long
    expected = MemoryBudget(17)
    expected.step(sum(held) / len(held), lr_multiplier=0.5)
    assert trainer.budget.fast == pytest.approx(expected.fast)
    assert trainer.budget.z == pytest.approx(expected.z)


def alphas_and_losses(trainer, num_updates):
    for _ in range(num_updates):
        train_step(trainer)
    metrics = trainer.averager.values()
    return metrics["train/alpha"], metrics["train/loss"]


@pytest.mark.parametrize("task", ["copy", "corridor"])
def test_a_resumed_run_moves_alpha_as_one_that_went_on(task, tmp_path):
    overrides = [
        "memory.budget=3",
        "model.ramp=2",
        "alpha_schedule.start_update=0",
        "actor_critic.update_epochs=2",
    ]
    config = tiny_config(*overrides, task=task)
    whole, first = (Trainer(config, tmp_path) for _ in range(2))
    alphas, losses = alphas_and_losses(whole, 6)
    assert len(set(alphas)) > 1
    alphas_and_losses(first, 3)  # in the middle of a rollout's epochs, where the model acts
    first.save_checkpoint()
    resumed = Trainer(config, tmp_path)
    assert resumed.load_checkpoint()
    assert alphas_and_losses(resumed, 3) == (alphas, losses)
    assert resumed.budget == whole.budget


REFUSED = {
    "memory.budget=much": "memory.budget: Value 'much'",
    "memory.budget=0": "memory.budget must be above 0, got 0.0",
    "memory.budget=-3": "memory.budget must be above 0, got -3.0",
    "memory.budget=nan": "memory.budget must be a finite number, got nan",
    "memory.budget=16": "memory.budget=16 must be above model.ramp=16: ",
    "memory.budget=64 memory.alpha=0": "memory.budget=64 needs a model.alpha above 0",
    "memory.budget=64 model=trans_xl": "memory.budget=64 moves alpha, which TransXL does not have, so that",
    "memory.budget=64 model=compressive": "which Compressive does not have, so that nothing would",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_budget_that_cannot_be_met_is_refused_in_one_line(overrides):
    with pytest.raises(ValueError, match="^[^\n]*$") as refusal:
        tiny_config(*overrides.split())
    assert REFUSED[overrides] in str(refusal.value)
    assert math.isfinite(tiny_config("memory.budget=17").memory.budget)
