"""Prediction: cross-entropy of the targets of a token stream, block after block."""

import math
from collections import Counter
from itertools import islice
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.base import IGNORE_INDEX, Batch, Task

from ...transformer import State
from ..build import autocast
from ..logging.answer_metrics import ACCURACY_METRICS, AnswerMetrics, loss_to_metric, score_predictions
from ..logging.metrics import MetricAverager, Metrics, RunningMeans
from ..logging.performance import StepTimer


class Prediction:
    """Predict each target from the tokens up to it.

    Raises ValueError at once for what evaluation would otherwise find only after the training.
    """

    def __init__(
        self, task: Task, config: DictConfig, device: torch.device, averager: MetricAverager, timer: StepTimer
    ):
        self.task, self.config, self.device, self.averager, self.timer = task, config, device, averager, timer
        for split in {*config.eval.splits, *(["valid"] if config.eval.interval else [])}:
            stream = task.stream(split, config.eval.batch_size, config.eval.block_size)
            if not any(map(count_targets, islice(stream, config.eval.max_blocks))):
                raise no_targets(split, config)
        self.stream = task.stream("train", config.train.batch_size, config.train.block_size)
        self.blocks = 0
        self.progress = MetricAverager()  # accuracy since the curriculum's last decision

    def loss(self, model: Any, state: State, span_loss_scale: float, progress: float) -> tuple[Tensor, State]:
        """Mean cross-entropy of the next block's targets, plus the scaled span loss; and the state after the block."""
        batch, num_targets, state = self.next_batch_with_targets(model, state)
        with autocast(self.config, self.device):
            logits, state, metrics = model(batch.tokens, state, batch.reach)
            losses, predictions = loss_and_predictions(model, logits, batch, num_targets, self.task.metric)
        loss, span_loss = losses.mean(), span_loss_scale * metrics.pop("span_loss")
        metrics |= {"train/loss": loss.detach(), "train/span_loss": span_loss.detach()}
        if predictions is not None:
            correct, scored, _ = score_predictions(predictions, batch, self.task.scoring)
            metrics["train/accuracy"] = (correct & scored).sum() / scored.sum()
            self.progress.add({"accuracy": metrics["train/accuracy"]})
        self.averager.add(metrics)
        return loss + span_loss, state

    def next_batch_with_targets(self, model: Any, state: State) -> tuple[Batch, int, State]:
        """The next block that has targets, and their number. Blocks without targets only fill the memory.

        Such blocks have no span loss either: it would shorten spans that no task loss could lengthen.
        """
        while True:
            start = self.timer.now()
            batch = next(self.stream)
            self.blocks += 1
            num_targets = count_targets(batch)
            batch = to_device(batch, self.device)
            if num_targets:
                return batch, num_targets, state
            with torch.no_grad(), autocast(self.config, self.device):
                _, state, metrics = model(batch.tokens, state, batch.reach)
            del metrics["span_loss"]
            self.averager.add(metrics)
            self.timer.add("memory_block", start)

    def summarize(self, means: Metrics) -> Metrics:
        """The means of a logging interval, with the task's own metric."""
        task, accuracy = self.task, means.pop("train/accuracy", math.nan)
        value = loss_to_metric(task.metric, means["train/loss"], accuracy, task.bytes_per_token("train"))
        metrics = {**means, f"train/{task.metric}": value}
        if task.curriculum_stage is not None:
            metrics["train/curriculum_stage"] = task.curriculum_stage
        return metrics

    def advance_curriculum(self) -> None:
        """Tell the task the training accuracy since the last call."""
        self.task.update_curriculum(self.progress.pop_means().get("accuracy", math.nan))

    def time_metrics(self, counts: Counter[str], milliseconds: Counter[str]) -> Metrics:
        """The time of a training step per block, and apart from it that of a block that only fills the memory."""
        train = self.config.train
        training_blocks, memory_blocks = counts["update"] * train.grad_accumulation, counts["memory_block"]
        timesteps = (training_blocks + memory_blocks) * train.batch_size * train.block_size
        metrics = {
            "perf/ms_per_batch": (milliseconds["update"] - milliseconds["memory_block"]) / training_blocks,
            "perf/tokens_per_second": 1000 * timesteps / milliseconds["update"],
        }
        if memory_blocks:
            metrics["perf/ms_per_memory_block"] = milliseconds["memory_block"] / memory_blocks
        return metrics

    @staticmethod
    @torch.no_grad()
    def evaluate(model: Any, task: Task, split: str, config: DictConfig, device: torch.device) -> Metrics:
        """Metrics split/... of a split, or of its first `eval.max_blocks` blocks, starting with empty memories."""
        model.eval()
        answers = AnswerMetrics(task.scoring, device, model.max_reach(config.eval.span_cap))
        averager = RunningMeans()
        state = model.initial_state(config.eval.batch_size)
        stream = task.stream(split, config.eval.batch_size, config.eval.block_size)
        for index, batch in enumerate(stream):
            if index == config.eval.max_blocks:
                break
            num_targets, batch = count_targets(batch), to_device(batch, device)
            with autocast(config, device):
                logits, state, metrics = model(batch.tokens, state, batch.reach, config.eval.span_cap)
                answers.add(*loss_and_predictions(model, logits, batch, num_targets, task.metric), batch)
            del metrics["span_loss"]
            timesteps = batch.tokens.shape[1]  # the last block may be shorter, and counts for less
            averager.add({"timesteps": timesteps} | {name: timesteps * value for name, value in metrics.items()})
        if not answers.counts[0]:
            raise no_targets(split, config)
        if not answers.nats.isfinite():
            raise ValueError(
                f"{split}/loss is {answers.nats.item()}: the weights have diverged; try a lower optimizer.lr"
            )
        means = averager.means()
        timesteps_per_block = means.pop("timesteps")
        metrics = answers.metrics(task.metric, task.bytes_per_token(split), task.extra_metrics)
        metrics |= {name: mean / timesteps_per_block for name, mean in means.items()}
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "blocks": self.blocks, "progress": self.progress.values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.blocks = state["blocks"]
        self.progress.load_values(state["progress"])


def loss_and_predictions(
    model: Any, logits: Tensor, batch: Batch, num_targets: int, metric: str
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each target in nats, (num_targets,), and the predicted token everywhere, (B, T).

    Predictions are None unless the metric needs them: with a large vocabulary they are not free.
    """
    targets = batch.targets.flatten()  # (B T,)
    rows = (targets != IGNORE_INDEX).nonzero_static(size=num_targets).squeeze(1)  # (num_targets,), without a sync
    losses = model.output_head.token_losses(logits.flatten(0, 1)[rows], targets[rows])
    return losses, model.output_head.predict(logits.detach()) if metric in ACCURACY_METRICS else None


def no_targets(split: str, config: DictConfig) -> ValueError:
    """The error of an evaluation that would have no result."""
    blocks = "" if config.eval.max_blocks is None else f"the first {config.eval.max_blocks} blocks of "
    return ValueError(f"{blocks}the {split} split have no targets to evaluate; use a larger eval.max_blocks, or null")


def count_targets(batch: Batch) -> int:
    """Number of targets, counted on the CPU so that no device has to be waited for."""
    return int((batch.targets != IGNORE_INDEX).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    tensors: Any = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in batch)
    return Batch(*tensors)
