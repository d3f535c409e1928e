"""Runs small enough for a test: any config of the project, shrunk."""

from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from expire_span.runner.settings import checked

SHRUNK = [
    "transformer.layers=2",
    "transformer.hidden_size=16",
    "transformer.heads=2",
    "transformer.feedforward_size=32",
    "train.batch=4",
    "train.block=16",
    "train.updates=4",
    "evaluation.every=null",
    "evaluation.batch=4",
    "evaluation.block=16",
    "evaluation.blocks=8",
    "schedule.warmup=2",
    "schedule.final_updates=0",
    "run.log_every=2",
    "run.checkpoint_every=2",
    "run.device=cpu",
    "run.threads=1",
    "run.progress=false",
    "wandb.mode=disabled",
]
TASKS = {  # smaller data for each
    "copy": ["task.distance=64", "task.first_distance=32", "task.episodes=8"],
    "collision": [
        "task.grid=4",
        "task.colours=2",
        "task.timesteps=4096",
        "task.evaluation_timesteps=1024",
        "task.worlds=4",
        "task.evaluation_worlds=4",
        "evaluation.blocks=32",
    ],
    "corridor": ["task.longest=8"],
    "portal": ["task.rooms=3", "task.first_rooms=2", "task.time_limit=30"],
    "instruction": [
        "task.chatter=null",
        "task.rooms=2",
        "task.distractors=2",
        "task.first_distractors=1",
        "evaluation.blocks=32",
    ],
    "collision_easy": [
        "task.grid=4",
        "task.timesteps=4096",
        "task.evaluation_timesteps=1024",
        "task.worlds=4",
        "task.evaluation_worlds=4",
        "train.block=20",
        "evaluation.block=20",
        "evaluation.blocks=32",
    ],
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        return compose("config", overrides=list(overrides))


def tiny(*overrides: str, task: str = "copy", text: Path | None = None) -> DictConfig:
    """A checked config of a task, shrunk; `text` is the file of task=text."""
    extra = TASKS.get(task, [] if text is None else [f"task.path={text}"])
    return checked(composed(f"task={task}", "memory.max_span=32", *SHRUNK, *extra, *overrides))
