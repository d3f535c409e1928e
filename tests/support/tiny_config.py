"""Configs of runs small enough for a test: any task and model of the project, shrunk."""

from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from expire_span.runner.config.schema import validate

SMALL_SIZES = [
    "transformer.num_layers=2",
    "transformer.hidden_size=16",
    "transformer.num_heads=2",
    "transformer.feedforward_size=32",
    "train.batch_size=4",
    "train.block_size=16",
    "train.updates=4",
    "eval.interval=null",
    "eval.batch_size=4",
    "eval.block_size=16",
    "eval.max_blocks=8",
    "lr_schedule.warmup_updates=2",
    "lr_schedule.final_updates=0",
    "run.log_every=2",
    "run.checkpoint_every=2",
    "run.device=cpu",
    "run.num_threads=1",
    "run.progress_bar=false",
    "wandb.mode=disabled",
]
SMALL_TASKS = {  # less data for each generated task
    "copy": ["task.episode_length=64", "task.initial_episode_length=32", "task.num_eval_episodes=8"],
    "collision": [
        "task.grid_size=4",
        "task.num_colors=2",
        "task.timesteps=4096",
        "task.eval_timesteps=1024",
        "task.num_simulations=4",
        "task.eval_simulations=4",
        "eval.max_blocks=32",
    ],
    "corridor": ["task.max_length=8"],
    "gymnasium": ["task.id=CartPole-v1"],
    "portal": ["task.num_rooms=3", "task.initial_num_rooms=2", "task.max_episode_steps=30"],
    "instruction": [
        "task.dialogue=null",
        "task.num_rooms=2",
        "task.distractors=2",
        "task.initial_distractors=1",
        "eval.max_blocks=32",
    ],
    "collision_easy": [
        "task.grid_size=4",
        "task.timesteps=4096",
        "task.eval_timesteps=1024",
        "task.num_simulations=4",
        "task.eval_simulations=4",
        "train.block_size=20",
        "eval.block_size=20",
        "eval.max_blocks=32",
    ],
}
COPY = ["memory.max_span=32", *SMALL_SIZES, *SMALL_TASKS["copy"]]  # overrides of the smallest run there is


def config_options(group: str) -> list[str]:
    """The options of a config group, such as all models."""
    folder = files("expire_span.conf") / group
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


OF_THE_PAPER = ("trans_xl", "adaptive_span", "compressive", "expire_span")


def each_model() -> list:
    """The models as parameters of a test; of those from after the paper, all but two are slow tests."""
    quick = (*OF_THE_PAPER, "expire_fox", "tova")
    return [pytest.param(model, marks=() if model in quick else pytest.mark.slow) for model in config_options("model")]


def compose_config(*overrides: str) -> DictConfig:
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def tiny_config(*overrides: str, task: str = "copy", text: Path | None = None) -> DictConfig:
    """A valid, shrunk config of a task; `text` is the file of task=text."""
    task_overrides = SMALL_TASKS.get(task, [] if text is None else [f"task.path={text}"])
    config = compose_config(f"task={task}", "memory.max_span=32", *SMALL_SIZES, *task_overrides, *overrides)
    config.milestones = {}  # as of every run that changes its recipe
    return validate(config)
