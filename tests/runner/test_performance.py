"""The times of a run: of training steps, of blocks that only fill the memory, and of rollouts, each by itself."""

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.logging import performance
from expire_span.runner.run_folder.files import append_metrics
from expire_span.runner.train import interval_metrics, train, train_step, training_costs
from expire_span.runner.trainer import Trainer


def timed_trainer(folder, monkeypatch, *overrides, **options):
    """A trainer on whose clock a forward pass takes 90 ms with gradient, 10 ms without, and nothing else any time."""
    clock = [0.0]
    monkeypatch.setattr(performance.time, "perf_counter", lambda: clock[0])
    trainer = Trainer(tiny_config(*overrides, **options), folder)

    def advance_clock(*_):
        clock[0] += 0.09 if torch.is_grad_enabled() else 0.01

    trainer.model.output_head.register_forward_hook(advance_clock)  # which acting calls, too, timestep by timestep
    return trainer


def times_of(trainer, updates):
    for _ in range(updates):
        train_step(trainer)
    return {name: value for name, value in interval_metrics(trainer).items() if name.startswith("perf/ms")}


@pytest.mark.parametrize("grad_accumulation", [1, 2])
def test_a_training_step_is_timed_without_the_blocks_that_only_fill_the_memory(grad_accumulation, folder, monkeypatch):
    whole = [
        "task.initial_episode_length=64",
        f"train.grad_accumulation={grad_accumulation}",
    ]  # 1 of 4 blocks has targets
    trainer = timed_trainer(folder, monkeypatch, *whole)
    times = times_of(trainer, updates=3)
    assert times == {"perf/ms_per_batch": pytest.approx(90), "perf/ms_per_memory_block": pytest.approx(10)}


def test_all_timesteps_of_an_interval_are_counted_against_all_of_its_time(folder, monkeypatch):
    trainer = timed_trainer(folder, monkeypatch, "task.initial_episode_length=64")
    train_step(trainer)
    assert trainer.objective.blocks == 4
    assert interval_metrics(trainer)["perf/tokens_per_second"] == pytest.approx(4 * 4 * 16 / 0.12)


def test_a_task_without_memory_only_blocks_reports_no_time_of_them(folder, text, monkeypatch):
    trainer = timed_trainer(folder, monkeypatch, task="text", text=text)
    assert times_of(trainer, updates=2) == {"perf/ms_per_batch": pytest.approx(90)}


@pytest.mark.parametrize("update_epochs", [1, 3])
def test_a_block_of_experience_takes_its_rollout_and_all_epochs_of_learning_from_it(update_epochs, folder, monkeypatch):
    trainer = timed_trainer(folder, monkeypatch, f"actor_critic.update_epochs={update_epochs}", task="corridor")
    rollout = 10 * (16 + 1)  # a forward pass for each timestep, and one for the value of what follows
    for updates in (2 * update_epochs, 2 * update_epochs + 1):  # also where the last rollout is not learned from yet
        times = times_of(trainer, updates)
        assert times["perf/ms_per_rollout"] == pytest.approx(rollout)
        assert times["perf/ms_per_batch"] == pytest.approx(rollout + 90 * update_epochs)


def test_the_first_times_after_resuming_count_only_what_was_done_since(folder, monkeypatch):
    train(tiny_config(), folder)
    trainer = timed_trainer(folder, monkeypatch, "train.updates=9999")
    assert trainer.load_checkpoint()
    assert times_of(trainer, updates=1)["perf/ms_per_batch"] == pytest.approx(90)


def test_the_times_of_a_training_are_medians_over_its_second_half_and_memory_is_its_peak(folder):
    for update, milliseconds in enumerate((900.0, 800.0, 7.0, 5.0, 6.0, 100.0)):
        row = {
            "update": update,
            "train/loss": 1.0,
            "perf/ms_per_batch": milliseconds,
            "perf/peak_resident_gb": 6.0 - update,
        }
        append_metrics(folder / "metrics.jsonl", row | ({"perf/ms_per_memory_block": 2.0} if update > 4 else {}))
    costs = training_costs(folder)
    assert costs == {"perf/ms_per_batch": 6.0, "perf/ms_per_memory_block": 2.0, "perf/peak_resident_gb": 6.0}
