"""A training run as one thing that can be saved and gone on with."""

import math
import uuid
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..memory import Memory
from . import actor_critic, checkpoint, prediction
from .build import build_model, build_optimiser, prepare
from .measures import Meter, Stopwatch
from .record import refuse_other_alphabet


class Training:
    """What the next update depends on, all of which a checkpoint holds, and the clock.

    Building it reads the data and reports, by ValueError or FileNotFoundError, whatever in the config cannot work.
    """

    def __init__(self, config: DictConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = prepare(config)
        self.task = instantiate(config.task)
        self.model = build_model(config, self.task, self.device)
        self.forward = torch.compile(self.model, dynamic=True) if config.run.compile else self.model
        self.optimiser = build_optimiser(config, self.model)
        self.kind = kind_of(self.task)
        self.source = self.kind.source(self.task, config, self.device)
        self.state = self.model.initial_state(config.train.batch)
        self.meter, self.watch = Meter(), Stopwatch(self.device)
        self.update = 0  # updates done
        self.blocks = self.blocks_read = 0  # blocks trained on, also those in which nothing is asked; at the last log
        self.run_id = uuid.uuid4().hex[:8]  # W&B's

    def save(self) -> None:
        """Raises ValueError, and leaves the last good checkpoint, if a loss or gradient was not a number."""
        self.refuse_nan()
        content = {
            "update": self.update,
            "blocks": self.blocks,
            "run_id": self.run_id,
            "seed": self.config.seed,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "source": self.source.state_dict(),
            "task": self.task.state_dict() if hasattr(self.task, "state_dict") else {},
            "now": self.state["now"],
            "layers": [tuple(memory[:4]) for memory in self.state["layers"]],
            "meter": self.meter.values(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        checkpoint.save(self.folder, content)

    def restore(self) -> bool:
        """Go on from the folder's checkpoint; False where it has none.

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
        streams = len(content["layers"][0][3]) - 1
        before = {"seed": content.get("seed", self.config.seed), "train.batch": streams}
        for key, value in before.items():
            if OmegaConf.select(self.config, key) != value:
                raise ValueError(f"{self.folder} holds a run with {key}={value}; use another hydra.run.dir")
        refuse_other_alphabet(self.folder, self.task)
        load_weights(self.model, content, self.folder)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(content["optimiser"])
        for group, own in zip(self.optimiser.param_groups, settings, strict=True):
            group.update(own)  # what the config says now, not when it was saved
        self.source.load_state_dict(content["source"])
        if content["task"]:
            self.task.load_state_dict(content["task"])
        layers = [Memory(*(tensor.to(self.device) for tensor in memory)) for memory in content["layers"]]
        self.state = {"now": content["now"].to(self.device), "layers": layers}
        self.meter.added.update({name: list(figures) for name, figures in content["meter"].items()})
        self.update, self.blocks, self.run_id = content["update"], content["blocks"], content["run_id"]
        self.blocks_read = self.blocks  # the clock begins anew
        torch.set_rng_state(content["random"])
        if self.device.type == "cuda" and content["random_cuda"]:
            torch.cuda.set_rng_state_all(content["random_cuda"])
        return True

    def refuse_nan(self) -> None:
        """Raises ValueError, with the update, if a loss or gradient since the last reading is not a number."""
        for name, each in (("train/loss", self.config.train.accumulate), ("train/gradient_norm", 1)):
            figures = self.meter.values().get(name, [])
            for number, figure in enumerate(figures):
                if not math.isfinite(figure):
                    update = self.update - (len(figures) - 1 - number) // each
                    raise ValueError(
                        f"{name} is {figure} at update {update}; try a lower optimiser.lr or train.clip. "
                        f"The last good checkpoint stays in {self.folder}"
                    )


def kind_of(task: Any) -> Any:
    """The module that knows what to do with such a task."""
    return actor_critic if hasattr(task, "actions") else prediction


def load_weights(model: torch.nn.Module, content: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where they are another model's."""
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        what = " ".join(str(error).splitlines()[1].split())
        raise ValueError(f"{folder} holds a checkpoint of another model ({what})") from None
