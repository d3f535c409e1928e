"""The state of a training run: everything that the next update depends on, and how to save and load it."""

import json
import logging
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from expire_span.tasks.base import LOWER_IS_BETTER, RLTask, Task

from ..memory.packed import with_max_age
from . import ranks
from .build import build_model, build_optimizer, setup_runtime
from .config.sections import add_new_keys
from .logging.answer_metrics import check_metrics
from .logging.metrics import MetricAverager, Metrics
from .logging.performance import StepTimer
from .memory_budget import MemoryBudget
from .micro_batches import moved, resolve_micro_batch_size, training_states
from .objectives import objective_class
from .run_folder import checkpoint, weights
from .run_folder.files import check_same_vocab
from .run_folder.identity import MAY_CHANGE, changes, check_same_data, check_same_run
from .run_folder.stream_states import check_memories, memories_of, select_memories, select_rows

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
        self.streams = ranks.own_streams(config.train.batch_size, "train.batch_size")
        resolve_micro_batch_size(config, self.task, self.device, self.streams.stop - self.streams.start)
        self.states = training_states(self.model, config, self.streams.stop - self.streams.start)
        self.budget = None if config.memory.budget is None else MemoryBudget(config.memory.budget)
        self.update = 0  # updates done
        self.run_id = uuid.uuid4().hex[:8]  # of the W&B run
        self.changes: list[dict[str, Any]] = []  # of the config, since the run began
        self.writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None  # of the checkpoint of saved_update
        self.saved_update = 0
        if ranks.rank():  # rank 0 goes on with the random numbers that drew the weights
            self.seed_dropout()

    def seed_dropout(self) -> None:
        """Let each rank drop out other units."""
        torch.manual_seed(hash((self.config.seed, self.update, ranks.rank())) % 2**63)

    def save_checkpoint(self) -> None:
        """Save everything, and the weights once more as safetensors, after `check_finite`."""
        self.start_checkpoint()
        self.finish_checkpoint()

    def start_checkpoint(self) -> None:
        """As `save_checkpoint`, but the files are written in the background, see `finish_checkpoint`."""
        self.check_finite()
        self.finish_checkpoint()
        save_id = ranks.broadcast(uuid.uuid4().hex)
        content: dict[str, Any] = {
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
            "memory_budget": self.budget and asdict(self.budget),
            "step": self.states.wait()[0]["step"],
            "metrics": self.averager.values(),
            "num_ranks": ranks.world_size(),
            "save_id": save_id,
        }
        streams: dict[str, Any] = {
            "format": checkpoint.FORMAT,
            "save_id": save_id,
            "first": self.streams.start,
            "objective": self.objective.streams_state_dict(),
            "memories": [],
            "rng": torch.get_rng_state(),
            "rng_cuda": [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [],
        }
        if self.config.run.checkpoint_memories:
            streams["memories"] = memories_of(self.states.wait(), self.states.rows, self.streams.start)
        if not ranks.is_main():  # which alone writes it
            content = {"update": self.update, "num_ranks": ranks.world_size()}
        content = on_host(content, copy=True)
        streams = on_host(streams) | {"objective": on_host(streams["objective"], copy=True)}
        self.saved_update = self.update
        self.writing = self.writer.submit(self.write_checkpoint, content, streams, self.current_weights())

    def write_checkpoint(self, content: dict[str, Any], streams: dict[str, Any], weights_now: weights.Weights) -> None:
        if ranks.is_main():
            weights.save(self.folder / weights.FILES["last"], weights_now._replace(tensors=content["model"]))
        checkpoint.save(self.folder, content, streams)

    @contextmanager
    def writing_checkpoints(self) -> Iterator[None]:
        """Let whatever ends the training wait for the checkpoint that is being written."""
        try:
            yield
        finally:
            self.writer.shutdown()
            if self.writing and (error := self.writing.exception()):
                log.warning(f"the last checkpoint is not complete: {error}")

    def finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written, by all ranks, and remove those that it replaces.

        Raises OSError if it could not be written.
        """
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        with ranks.failing_together():
            writing.result()
        if ranks.is_main():
            checkpoint.prune(self.folder, self.saved_update, self.config.run.keep_checkpoints)
        ranks.wait_for_all()  # before the next one is begun

    def current_weights(self, value: float | None = None) -> weights.Weights:
        task, data = OmegaConf.to_container(self.config.task, resolve=True), plain(self.task.data_info)
        blocks = self.objective.blocks
        state = self.task.eval_state_dict()
        return weights.Weights(self.model.state_dict(), self.update, blocks, task, data, value, self.run_id, state)

    def save_if_best(self, metrics: Metrics) -> None:
        """Keep these weights if the task's metric on the validation split is better than ever before in this folder."""
        if not ranks.is_main():
            return
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
        content = checkpoint.load(self.folder, self.streams)
        if content is None:
            if (self.folder / "summary.json").exists():
                raise ValueError(f"{self.folder} holds a run's results but no checkpoint; use another hydra.run.dir")
            return False
        if content["update"] > self.config.train.updates:
            done = f"{self.folder} has done {content['update']} updates"
            raise ValueError(f"{done}, more than train.updates={self.config.train.updates}")
        config: Any = OmegaConf.to_container(self.config, resolve=True)
        check_same_run(self.folder, add_new_keys(content["config"]), config, changeable)
        check_same_data(self.folder, content["data"], plain(self.task.data_info))
        check_same_vocab(self.folder, self.task)
        load_weights(self.model, content["model"], self.folder)
        changed = {key: [old, new] for key, old, new in changes(content["config"], config)}
        self.changes = content["changes"] + ([{"update": content["update"], **changed}] if changed else [])
        try:
            self.restore(content)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = checkpoint.short_reason(error)
            raise ValueError(f"{self.folder} holds a checkpoint that does not fit this run ({reason})") from None
        return True

    def restore(self, content: dict[str, Any]) -> None:
        """Set everything but the weights to what a checkpoint holds."""
        for saved, group in zip(content["optimizer"]["param_groups"], self.optimizer.param_groups, strict=False):
            saved |= {key: value for key, value in group.items() if key != "params"}  # the config's current values
        self.optimizer.load_state_dict(content["optimizer"])  # a fused optimizer puts its step on the device
        self.update, self.run_id = content["update"], content["run_id"]
        parts = content["streams"]  # of the ranks that had this rank's streams
        of_objective = select_rows([(part["first"], part["objective"]) for part in parts], self.streams)
        self.task.load_state_dict(content["task"])  # before its environments
        self.objective.load_state_dict(content["objective"], of_objective)
        self.restore_memories(content["step"].to(self.device), [saved for part in parts for saved in part["memories"]])
        self.averager.load_values(content["metrics"])
        if self.budget:
            self.budget = MemoryBudget(**content["memory_budget"])
        if content["num_ranks"] != ranks.world_size():
            self.seed_dropout()
            return
        torch.set_rng_state(parts[0]["rng"])
        if self.device.type == "cuda" and parts[0]["rng_cuda"]:
            torch.cuda.set_rng_state(parts[0]["rng_cuda"][0], self.device)

    def restore_memories(self, step: Tensor, saved: Sequence[dict[str, Any]]) -> None:
        """Set the memories to those that a checkpoint holds. If it holds none they stay empty, which is recorded."""
        if not saved:
            self.changes = [*self.changes, {"update": self.update, "memories": ["lost", "empty"]}]
        for index, rows in enumerate(self.states.rows):
            layers = self.states[index]["layers"]
            if saved:
                own = slice(self.streams.start + rows.start, self.streams.start + rows.stop)
                layers = select_memories(saved, own)
                check_memories(layers, len(self.states[index]["layers"]), own, self.config.transformer.hidden_size)
                layers = [moved(memory, lambda tensor: tensor.to(self.device)) for memory in layers]
            self.states[index] = {"step": step, "layers": [with_max_age(memory, step) for memory in layers]}
        self.states.pop_held()  # counts those of training blocks only

    def check_finite(self) -> None:
        """Raises ValueError, naming the update, if the training has diverged, see `diverged`."""
        for name, values_per_update in (("train/loss", self.config.train.grad_accumulation), ("train/grad_norm", 1)):
            values = self.averager.values().get(name, [])
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    update = self.update - (len(values) - 1 - index) // values_per_update
                    raise self.diverged(f"{name} is {value} at update {update}", last_good_update=update - 2)
        kept = [*self.model.state_dict().values()]
        kept += [value for state in self.optimizer.state.values() for value in state.values()]
        finite = self.states.are_finite() + [tensor.isfinite().all() for tensor in kept if isinstance(tensor, Tensor)]
        is_finite = bool(torch.stack([flag.to(self.device) for flag in finite]).all())
        if ranks.max_numbers([not is_finite])[0]:
            problem = f"weights, optimizer state or memories are no longer finite after update {self.update}"
            raise self.diverged(problem, last_good_update=self.update - 1)

    def diverged(self, problem: str, last_good_update: int) -> ValueError:
        """The error of a training that has diverged.

        A loss or gradient that is not finite also condemns the weights that gave it: a checkpoint of those is removed
        if there is one before it, from which the training can go on.
        """
        self.finish_checkpoint()
        ranks.wait_for_all()  # until they have all seen the same files
        saved = checkpoint.paths(self.folder)
        good = [path for path in saved if checkpoint.update_of(path) <= last_good_update]
        if good:
            for path in saved[: -len(good)] if ranks.is_main() else ():
                checkpoint.remove(path)
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
    task = instantiate(config.task, _recursive_=False)  # wrappers of environments have a _target_, too
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


def on_host(value: Any, copy: bool = False) -> Any:
    """Nested dictionaries and lists with their tensors on the host; copied, even if they are there, if asked for."""
    if isinstance(value, dict):
        return {key: on_host(item, copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(item, copy) for item in value)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=copy)
    return value
