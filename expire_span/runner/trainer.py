"""The state of a training run: everything that the next update depends on, and how to save and load it."""

import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from expire_span.tasks.base import LOWER_IS_BETTER, RLTask, Task

from ..memory import Memory
from ..memory.packed import with_max_age
from .build import build_model, build_optimizer, setup_runtime
from .logging.answer_metrics import check_metrics
from .logging.metrics import MetricAverager, Metrics
from .logging.performance import StepTimer
from .objectives import objective_class
from .run_folder import checkpoint, weights
from .run_folder.files import check_same_vocab
from .run_folder.identity import MAY_CHANGE, changes, check_same_data, check_same_run

log = logging.getLogger(__name__)


class Trainer:
    """Task, model, objective, optimizer and memories of a run, and its timer.

    Constructing it reads the data and reports, by ValueError or FileNotFoundError, whatever in the config cannot work.
    """

    def __init__(self, config: DictConfig, folder: Path):
        self.config, self.folder = config, folder
        if config.eval.weights != "last":
            raise ValueError(
                f"eval.weights={config.eval.weights} is for evaluate=RUN; training evaluates the last weights"
            )
        self.device = setup_runtime(config)
        self.task = build_task(config)
        self.model = build_model(config, self.task, self.device)
        self.forward: Any = torch.compile(self.model, dynamic=True) if config.run.compile else self.model
        self.optimizer = build_optimizer(config, self.model)
        self.averager, self.timer = MetricAverager(), StepTimer(self.device)
        self.objective = objective_class(self.task)(self.task, config, self.device, self.averager, self.timer)
        self.state = self.model.initial_state(config.train.batch_size)
        self.update = 0  # updates done
        self.run_id = uuid.uuid4().hex[:8]  # of the W&B run
        self.changes: list[dict[str, Any]] = []  # of the config, since the run began

    def save_checkpoint(self) -> None:
        """Save everything, and the weights once more as safetensors, after `check_finite`."""
        self.check_finite()
        weights.save(self.folder / weights.FILES["last"], self.current_weights())
        content = {
            "format": checkpoint.FORMAT,
            "update": self.update,
            "run_id": self.run_id,
            "config": OmegaConf.to_container(self.config, resolve=True),
            "data": plain(self.task.data_info),
            "changes": self.changes,
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
        checkpoint.save(self.folder, content, self.config.run.keep_checkpoints)

    def current_weights(self, value: float | None = None) -> weights.Weights:
        task, data = OmegaConf.to_container(self.config.task, resolve=True), plain(self.task.data_info)
        return weights.Weights(self.model.state_dict(), self.update, self.objective.blocks, task, data, value)

    def save_if_best(self, metrics: Metrics) -> None:
        """Keep these weights if the task's metric on the validation split is better than ever before in this folder."""
        path, metric = self.folder / weights.FILES["best"], self.task.metric
        value = metrics.get(f"valid/{metric}", metrics.get(f"valid/rl/{metric}", math.nan))
        try:
            best = weights.load(path)
        except ValueError as error:
            log.warning(f"{error}, and is replaced")
            best = None
        best_value = math.nan if best is None or best.value is None else best.value
        is_better = value < best_value if metric in LOWER_IS_BETTER else value > best_value
        if not math.isnan(value) and (math.isnan(best_value) or is_better):
            weights.save(path, self.current_weights(value))

    def load_checkpoint(self, changeable: Sequence[str] = MAY_CHANGE) -> bool:
        """Continue from the folder's checkpoint; False if it has none.

        Args:
            changeable: sections and keys of the config that may have other values than the folder's run.

        Raises:
            ValueError: where that would lose or contradict what the folder holds.
        """
        content = checkpoint.load(self.folder)
        if content is None:
            if (self.folder / "summary.json").exists():
                raise ValueError(f"{self.folder} holds a run's results but no checkpoint; use another hydra.run.dir")
            return False
        if content["update"] > self.config.train.updates:
            done = f"{self.folder} has done {content['update']} updates"
            raise ValueError(f"{done}, more than train.updates={self.config.train.updates}")
        config: Any = OmegaConf.to_container(self.config, resolve=True)
        check_same_run(self.folder, content["config"], config, changeable)
        check_same_data(self.folder, content["data"], plain(self.task.data_info))
        check_same_vocab(self.folder, self.task)
        load_weights(self.model, content["model"], self.folder)
        layers = [load_memory(tensors, self.config.transformer.hidden_size) for tensors in content["layers"]]
        if [len(layer.offsets) - 1 for layer in layers] != [self.config.train.batch_size] * len(self.state["layers"]):
            raise ValueError(f"{self.folder} holds a checkpoint that does not fit this run (its memories do not)")
        changed = {key: [old, new] for key, old, new in changes(content["config"], config)}
        self.changes = content["changes"] + ([{"update": content["update"], **changed}] if changed else [])
        try:
            self.restore(content, layers)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            reason = checkpoint.short_reason(error)
            raise ValueError(f"{self.folder} holds a checkpoint that does not fit this run ({reason})") from None
        return True

    def restore(self, content: dict[str, Any], layers: Sequence[tuple]) -> None:
        """Set everything but the weights to what a checkpoint holds."""
        for saved, group in zip(content["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            saved |= {key: value for key, value in group.items() if key != "params"}  # the config's current values
        self.optimizer.load_state_dict(content["optimizer"])  # a fused optimizer puts its step on the device
        self.objective.load_state_dict(content["objective"])
        self.task.load_state_dict(content["task"])
        step = content["step"].to(self.device)
        memories = [Memory(*(tensor.to(self.device) for tensor in layer[:4])) for layer in layers]
        self.state = {"step": step, "layers": [with_max_age(memory, step) for memory in memories]}
        self.averager.load_values(content["metrics"])
        self.update, self.run_id = content["update"], content["run_id"]
        torch.set_rng_state(content["rng"])
        if self.device.type == "cuda" and content["rng_cuda"]:
            torch.cuda.set_rng_state_all(content["rng_cuda"])

    def check_finite(self) -> None:
        """Raises ValueError, naming the update, if the training has diverged, see `diverged`."""
        for name, values_per_update in (("train/loss", self.config.train.grad_accumulation), ("train/grad_norm", 1)):
            values = self.averager.values().get(name, [])
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    update = self.update - (len(values) - 1 - index) // values_per_update
                    raise self.diverged(f"{name} is {value} at update {update}", last_good_update=update - 2)
        kept = [*self.model.state_dict().values(), *(memory.hidden for memory in self.state["layers"])]
        kept += [value for state in self.optimizer.state.values() for value in state.values()]
        finite = [tensor.isfinite().all() for tensor in kept if isinstance(tensor, Tensor)]
        if not torch.stack([flag.to(self.device) for flag in finite]).all():
            problem = f"weights, optimizer state or memories are no longer finite after update {self.update}"
            raise self.diverged(problem, last_good_update=self.update - 1)

    def diverged(self, problem: str, last_good_update: int) -> ValueError:
        """The error of a training that has diverged.

        A loss or gradient that is not finite also condemns the weights that gave it: a checkpoint of those is removed
        if there is one before it, from which the training can go on.
        """
        saved = checkpoint.paths(self.folder)
        good = [path for path in saved if checkpoint.update_of(path) <= last_good_update]
        if good:
            for path in saved[: -len(good)]:
                path.unlink()
            kept = f"the last good checkpoint is that of update {checkpoint.update_of(good[0])} in {self.folder}"
        elif saved:
            kept = (
                f"the only checkpoint in {self.folder} holds the weights that led to this; start over in another folder"
            )
        else:
            kept = "nothing has been saved"
        return ValueError(f"{problem}; try a lower optimizer.lr or train.grad_clip; {kept}")


def plain(data_info: Any) -> Any:
    """The data_info of a task as JSON holds it: a checkpoint is made of plain types only."""
    return json.loads(json.dumps(data_info))


def build_task(config: DictConfig) -> Task | RLTask:
    """The config's task. Raises ValueError if its class is not a task's, or if its metric is not known."""
    task = instantiate(config.task)
    if isinstance(task, RLTask):  # its metric is one of its environments' own
        return task
    if not isinstance(task, Task):
        raise ValueError(f"task._target_={config.task._target_} must be a subclass of expire_span.tasks.base.Task")
    check_metrics([task.metric, *task.extra_metrics])
    return task


def load_weights(model: torch.nn.Module, weights: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError if the weights are of another model."""
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        lines = str(error).splitlines()
        reason = " ".join((lines[1:] or lines)[0].split())
        raise ValueError(f"{folder} holds a checkpoint of another model ({reason})") from None


def load_memory(tensors: Any, hidden_size: int) -> Memory:
    """A layer's memory as it was saved. Raises ValueError for any that the attention could not be given."""
    try:
        memory = Memory(*tensors)
        rows, offsets = len(memory.time), memory.offsets
        is_valid = (
            memory.kv is None
            and memory.hidden.shape == (rows, hidden_size)
            and memory.hidden.is_floating_point()
            and memory.time.shape == memory.min_distance.shape == (rows,)
            and {memory.time.dtype, memory.min_distance.dtype, offsets.dtype} == {torch.int64}
            and offsets.dim() == 1
            and offsets[0] == 0
            and offsets[-1] == rows
            and bool((offsets.diff() >= 0).all())
        )
    except (AttributeError, IndexError, TypeError):
        is_valid = False
    if not is_valid:
        raise ValueError(f"the memories of the checkpoint do not fit a model of transformer.hidden_size={hidden_size}")
    return memory
