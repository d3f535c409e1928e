"""Runs in environments of Gymnasium: what goes on after a stop, what is saved, and how they end."""

import logging
import math

import pytest
import torch
from forked_command import forked_command
from tiny_config import SMALL_SIZES, tiny_config

pytest.importorskip("gymnasium")
from expire_span.runner.evaluate import evaluate_run
from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.config_files import ConfigFiles, load_config
from expire_span.runner.run_folder.files import read_metrics, read_summary, write_texts
from expire_span.runner.train import train, train_step
from expire_span.runner.trainer import Trainer

CHECKING = "checking_envs:CheckingEnv"


def gymnasium_config(*overrides):
    return tiny_config(*overrides, task="gymnasium")


def checking_config(kwargs, *overrides):
    return gymnasium_config(f"task.id={CHECKING}", f"task.kwargs={{{kwargs}}}", *overrides)


@pytest.mark.parametrize("action", ["discrete", "multi_discrete", "box"])
def test_every_kind_of_action_trains(action, folder):
    short = ["train.updates=3", "actor_critic.update_epochs=3", "eval.max_blocks=1", "eval.splits=[test]"]
    metrics = train(checking_config(f"observation:dict,action:{action}", *short), folder)
    assert metrics["test/rl/episode_return"] == pytest.approx(5)
    losses = [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))


def test_the_last_timestep_of_a_rollout_is_bootstrapped_with_the_value_of_its_last_observation(folder):
    """The block ends with the truncation of all episodes, so that the value after it is that of their last one."""
    config = checking_config("length:5,truncated:true", "train.block_size=5", "actor_critic.normalize_advantage=false")
    trainer = Trainer(config, folder)
    block = trainer.objective.next_block(trainer.model, trainer.states)
    assert block["truncated"][:, -1].all()
    assert trainer.objective.envs.resetting.all()
    advantage = block["reward"][:, -1] + config.actor_critic.discount * block["next_value"] - block["value"][:, -1]
    assert torch.allclose(block["advantage"][:, -1], advantage)
    assert block["next_value"].abs().min() > 0


def test_a_resumed_run_begins_new_episodes_and_keeps_everything_else(folder, caplog):
    config = gymnasium_config("actor_critic.update_epochs=2")
    stopped = Trainer(config, folder)
    first = stopped.objective.envs.observe()
    for _ in range(3):  # between the two epochs of a rollout
        train_step(stopped)
    stopped.save_checkpoint()
    resumed = []
    for _ in range(2):
        trainer = Trainer(config, folder)
        with caplog.at_level(logging.INFO):
            assert trainer.load_checkpoint()
        resumed.append(trainer)
    assert caplog.text.count("the episodes of CartPole-v1 cannot be saved: new ones begin, with another seed") == 2
    for trainer in resumed:
        envs = trainer.objective.envs
        assert envs.steps.eq(0).all()
        assert envs.num_steps == stopped.objective.envs.num_steps
        assert not torch.equal(envs.observe(), first)
        assert envs.reward_rms.var == stopped.objective.envs.reward_rms.var
        saved, count = checkpoint.load(folder)["task"]["observations"], trainer.task.observation_rms.count
        assert count == saved["count"] + envs.num_envs  # their first observations
        for name, values in stopped.objective.rollout.items():
            assert torch.equal(trainer.objective.rollout[name], values)
        for _ in range(2):
            train_step(trainer)
    for one, other in zip(*(trainer.model.parameters() for trainer in resumed), strict=True):
        assert torch.equal(one, other)


def test_evaluating_a_run_uses_the_statistics_of_its_observations(folder, tmp_path):
    config = gymnasium_config("eval.interval=4", "eval.splits=[test]", "eval.max_blocks=1", "train.batch_size=2")
    trained = train(config, folder)
    for weights in ("last", "best"):
        config.eval.weights = weights
        (tmp_path / weights).mkdir()
        assert (
            evaluate_run(config, folder, tmp_path / weights)["test/rl/episode_return"]
            == trained["test/rl/episode_return"]
        )
    (folder / "model.safetensors").unlink()  # then those of the checkpoint
    config.eval.weights = "last"
    (tmp_path / "again").mkdir()
    assert (
        evaluate_run(config, folder, tmp_path / "again")["test/rl/episode_return"] == trained["test/rl/episode_return"]
    )


def run_until_failure(kwargs, folder, tmp_path):
    overrides = [*SMALL_SIZES, "memory.max_span=32", "actor_critic.update_epochs=1", "run.checkpoint_every=100"]
    command = ["expire-span", "task=gymnasium", f"task.id={CHECKING}", f"task.kwargs={{{kwargs}}}", *overrides]
    return forked_command([*command, f"hydra.run.dir={folder}"], tmp_path)


def test_a_run_is_saved_before_the_error_of_an_environment_ends_it_with_its_traceback(tmp_path):
    folder = tmp_path / "run"
    ended = run_until_failure("raises_at:40", folder, tmp_path)  # in the third rollout of 16 timesteps
    assert ended.code == 1
    assert "ValueError: the motor is on fire" in ended.stderr
    assert f"EnvError: {CHECKING} has raised an error at step" in ended.stderr
    assert f"resume={folder}" in ended.stdout + ended.stderr
    assert checkpoint.load(folder)["update"] == 2


def test_an_observation_that_is_not_a_number_ends_a_run_in_one_line(tmp_path):
    folder = tmp_path / "run"
    ended = run_until_failure("nan_at:40", folder, tmp_path)
    assert ended.code == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {CHECKING} has given observations that are not finite")
    assert "Traceback" not in ended.stderr
    assert checkpoint.load(folder)["update"] == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.id", "trap_module:Env-v0"),
        ("task.wrappers", [{"_target_": "trap_module.Wrapper"}]),
        ("task.wrappers", [{"_target_": "gymnasium.wrappers.ClipReward"}, {"_target_": "os.system"}]),
        ("task.wrappers", "os.system"),
        ("task.wrappers", [["os.system"]]),
    ],
)
def test_a_run_folder_names_no_module_of_environments_but_those_that_are_trusted(key, value, folder, monkeypatch):
    config = gymnasium_config()
    name = key.partition(".")[2]
    config.task[name] = value
    write_texts(folder, ConfigFiles(config, {"runtime": {"choices": {}}}, []).texts())
    with pytest.raises(ValueError, match=f"^{key}=.* is no part of expire-span, and would be imported"):
        load_config(folder)
    monkeypatch.setenv("EXPIRE_SPAN_TRUST", "trap_module")
    if "trap_module" in str(value):
        assert load_config(folder).task[name] == value


def test_the_summary_names_the_environment(folder):
    train(gymnasium_config("train.updates=1", "eval.splits=[]"), folder)
    assert read_summary(folder)["config"]["task"]["id"] == "CartPole-v1"
