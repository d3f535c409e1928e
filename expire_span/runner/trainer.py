"""The state of a training run: everything that the next update depends on, and how to save and load it."""

import math
import uuid
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from expire_span.tasks.base import RLTask, Task

from ..memory import Memory
from .build import build_model, build_optimizer, setup_runtime
from .logging.answer_metrics import check_metrics
from .logging.metrics import MetricAverager
from .logging.performance import StepTimer
from .objectives import objective_class
from .run_folder import checkpoint
from .run_folder.files import check_same_vocab


class Trainer:
    """Task, model, objective, optimizer and memories of a run, and its timer.

    Constructing it reads the data and reports, by ValueError or FileNotFoundError, whatever in the config cannot work.
    """

    def __init__(self, config: DictConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = setup_runtime(config)
        self.task = build_task(config)
        self.model = build_model(config, self.task, self.device)
        self.forward: Any = torch.compile(self.model, dynamic=True) if config.run.compile else self.model
        self.optimizer = build_optimizer(config, self.model)
        self.averager, self.timer = MetricAverager(), StepTimer(self.device)
        self.objective = objective_class(self.task)(self.task, config, self.device, self.averager)
        self.state = self.model.initial_state(config.train.batch_size)
        self.update = 0  # updates done
        self.logged_blocks = 0  # objective.blocks at the last log
        self.run_id = uuid.uuid4().hex[:8]  # of the W&B run

    def save_checkpoint(self) -> None:
        """Raises ValueError, and keeps the last good checkpoint, if a loss or gradient norm was not finite."""
        self.check_finite()
        content = {
            "format": checkpoint.FORMAT,
            "update": self.update,
            "run_id": self.run_id,
            "seed": self.config.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "task": self.task.state_dict(),
            "step": self.state["step"],
            "layers": [tuple(memory[:4]) for memory in self.state["layers"]],
            "metrics": self.averager.values(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        checkpoint.save(self.folder, content)

    def load_checkpoint(self) -> bool:
        """Continue from the folder's checkpoint; False if it has none.

        Raises ValueError where that would lose or contradict what the folder holds.
        """
        content = checkpoint.load(self.folder)
        if content is None:
            if (self.folder / "summary.json").exists():
                raise ValueError(f"{self.folder} holds a run's results but no checkpoint; use another hydra.run.dir")
            return False
        if content["update"] > self.config.train.updates:
            done = f"{self.folder} has done {content['update']} updates"
            raise ValueError(f"{done}, more than train.updates={self.config.train.updates}")
        saved_settings = {"seed": content["seed"], "train.batch_size": len(content["layers"][0][3]) - 1}
        for key, value in saved_settings.items():
            if OmegaConf.select(self.config, key) != value:
                raise ValueError(f"{self.folder} holds a run with {key}={value}; use another hydra.run.dir")
        check_same_vocab(self.folder, self.task)
        load_weights(self.model, content, self.folder)
        current_settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, current_settings, strict=True):
            group.update(settings)  # the config's current values, not those saved
        self.objective.load_state_dict(content["objective"])
        self.task.load_state_dict(content["task"])
        layers = [Memory(*(tensor.to(self.device) for tensor in memory)) for memory in content["layers"]]
        self.state = {"step": content["step"].to(self.device), "layers": layers}
        self.averager.load_values(content["metrics"])
        self.update, self.run_id = content["update"], content["run_id"]
        self.logged_blocks = self.objective.blocks  # timing restarts
        torch.set_rng_state(content["rng"])
        if self.device.type == "cuda" and content["rng_cuda"]:
            torch.cuda.set_rng_state_all(content["rng_cuda"])
        return True

    def check_finite(self) -> None:
        """Raises ValueError, naming the update, if a loss or gradient norm since the last log is not finite."""
        for name, values_per_update in (("train/loss", self.config.train.grad_accumulation), ("train/grad_norm", 1)):
            values = self.averager.values().get(name, [])
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    update = self.update - (len(values) - 1 - index) // values_per_update
                    raise ValueError(
                        f"{name} is {value} at update {update}; try a lower optimizer.lr or train.grad_clip. "
                        f"The last good checkpoint stays in {self.folder}"
                    )


def build_task(config: DictConfig) -> Task | RLTask:
    """The config's task. Raises ValueError if its class is not a task's, or if its metric is not known."""
    task = instantiate(config.task)
    if isinstance(task, RLTask):  # its metric is one of its environments' own
        return task
    if not isinstance(task, Task):
        raise ValueError(f"task._target_={config.task._target_} must be a subclass of expire_span.tasks.base.Task")
    check_metrics([task.metric, *task.extra_metrics])
    return task


def load_weights(model: torch.nn.Module, content: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if the checkpoint is of another model."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1].split())
        raise ValueError(f"{folder} holds a checkpoint of another model ({reason})") from None
