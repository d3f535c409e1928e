"""A curriculum counts updates of its own: neither logging nor evaluation, saving or resuming moves it."""

import pytest
from tiny_config import tiny_config

from expire_span.runner.train import evaluate, interval_metrics, train_step
from expire_span.runner.trainer import Trainer

GROWING = {  # the episodes of each task become longer at every decision, after every third update
    "copy": ["task.episode_length=128", "task.initial_episode_length=16", "task.curriculum_threshold=0.0"],
    "instruction": ["task.distractors=9", "task.curriculum_threshold=-1.0"],
    "corridor": ["task.max_length=40", "task.initial_max_length=4", "task.curriculum_threshold=0.0"],
    "portal": ["task.num_rooms=8", "task.curriculum_threshold=0.0", "task.curriculum_min_intervals=1"],
}


def curriculum_config(task):
    return tiny_config(
        *GROWING[task], "train.curriculum_interval=3", "train.updates=99", "eval.max_blocks=8", task=task
    )


def losses_and_stages(trainer, updates, *, log_every=2, evaluate_every=99):
    history = []
    while trainer.update < updates:
        train_step(trainer)
        history.append((trainer.averager.values()["train/loss"][-1], trainer.task.curriculum_stage))
        if trainer.update % log_every == 0:
            interval_metrics(trainer)
        if trainer.update % evaluate_every == 0:
            evaluate(trainer, "valid")
    return history


@pytest.mark.parametrize("task", GROWING)
def test_logging_and_evaluating_at_other_updates_changes_no_loss_and_no_stage(task, folder):
    config = curriculum_config(task)
    expected = losses_and_stages(Trainer(config, folder), 12, log_every=2)
    assert losses_and_stages(Trainer(config, folder), 12, log_every=7, evaluate_every=11) == expected
    assert len({stage for _, stage in expected}) > 1


@pytest.mark.parametrize("task", ["copy", "corridor"])
def test_the_stage_changes_only_after_updates_that_the_interval_divides(task, folder):
    stages = [stage for _, stage in losses_and_stages(Trainer(curriculum_config(task), folder), 12)]
    changes = [update for update in range(1, 12) if stages[update] != stages[update - 1]]
    assert changes
    assert all((update + 1) % 3 == 0 for update in changes)


@pytest.mark.parametrize("task", GROWING)
def test_a_run_resumed_within_an_interval_decides_as_if_it_had_not_stopped(task, folder, tmp_path):
    config = curriculum_config(task)
    expected = losses_and_stages(Trainer(config, tmp_path), 12)
    stopped = Trainer(config, folder)
    assert losses_and_stages(stopped, 5) == expected[:5]
    stopped.save_checkpoint()
    resumed = Trainer(config, folder)
    assert resumed.load_checkpoint()
    assert losses_and_stages(resumed, 12) == expected[5:]
