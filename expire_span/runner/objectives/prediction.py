"""Prediction: cross-entropy of the targets of a token stream, block after block."""

import math
from collections import Counter
from itertools import islice
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.base import IGNORE_INDEX, Batch, Task

from ..build import autocast
from ..logging.answer_metrics import ACCURACY_METRICS, AnswerMetrics, loss_to_metric, score_predictions
from ..logging.metrics import MetricAverager, Metrics, RunningMeans
from ..logging.performance import StepTimer
from ..micro_batches import MicroBatches, evaluation_states
from ..ranks import keep_pace, own_streams


class TrainingBlock(NamedTuple):
    """The next block of this rank's streams, and what of it concerns the streams of all ranks."""

    batch: Batch  # on the device
    targets_per_stream: list[int]
    num_targets: int  # of all streams
    num_answers: int  # of all streams, 0 unless the metric is about them
    drop_limit: Tensor | None  # l of random drop


class Prediction:
    """Predict each target from the tokens up to it.

    Raises ValueError at once for what evaluation would otherwise find only after the training.
    """

    def __init__(
        self, task: Task, config: DictConfig, device: torch.device, averager: MetricAverager, timer: StepTimer
    ):
        self.task, self.config, self.device, self.averager, self.timer = task, config, device, averager, timer
        self.streams = own_streams(config.train.batch_size, "train.batch_size")
        for split in {*config.eval.splits, *(["valid"] if config.eval.interval else [])}:
            own_streams(config.eval.batch_size, "eval.batch_size")
            stream = task.stream(split, config.eval.batch_size, config.eval.block_size)
            if not any(map(count_targets, islice(stream, config.eval.max_blocks))):
                raise no_targets(split, config)
        self.stream = task.stream("train", config.train.batch_size, config.train.block_size)
        self.generator = torch.Generator().manual_seed(config.seed)  # of random drop, the same on all ranks
        self.blocks = 0
        self.progress = MetricAverager()  # accuracy since the curriculum's last decision

    def next_block(self, model: Any, states: MicroBatches) -> TrainingBlock:
        """The next block that has targets. Blocks without targets only fill the memory.

        Such blocks have no span loss either: it would shorten spans that no task loss could lengthen.
        """
        while True:
            start = self.timer.now()
            batch = next(self.stream)  # of all ranks
            self.blocks += 1
            drop_limit = model.sample_drop_limit(self.generator)
            own = rows_of(batch, self.streams)
            if num_targets := count_targets(batch):
                num_answers = 0
                if self.task.metric in ACCURACY_METRICS:  # counted on the CPU, like the targets
                    num_answers = int(score_predictions(batch.targets, batch, self.task.scoring)[1].sum())
                per_stream = (own.targets != IGNORE_INDEX).sum(1).tolist()
                return TrainingBlock(to_device(own, self.device), per_stream, num_targets, num_answers, drop_limit)
            own = to_device(own, self.device)
            for index, rows in enumerate(states.rows):
                part = rows_of(own, rows)
                with torch.no_grad(), autocast(self.config, self.device):
                    _, state, metrics = model(part.tokens, states[index], part.reach, drop_limit=drop_limit)
                states[index] = state
                del metrics["span_loss"]
                self.averager.add_share(metrics, self.share(rows), is_first=index == 0)
            self.timer.add("memory_block", start)

    def loss(
        self,
        model: Any,
        block: TrainingBlock,
        states: MicroBatches,
        index: int,
        span_loss_scale: float,
        progress: float,
    ) -> Tensor:
        """One micro-batch's share of the mean cross-entropy of all targets, plus the scaled span loss."""
        rows, share = states.rows[index], self.share(states.rows[index])
        part, num_targets = rows_of(block.batch, rows), sum(block.targets_per_stream[rows])
        with autocast(self.config, self.device):
            logits, state, metrics = model(part.tokens, states[index], part.reach, drop_limit=block.drop_limit)
            losses, predictions = loss_and_predictions(model, logits, part, num_targets, self.task.metric)
        states[index] = state
        loss, span_loss = losses.sum() / block.num_targets, span_loss_scale * metrics.pop("span_loss") * share
        self.averager.add_share(metrics, share, is_first=index == 0)
        sums = {"train/loss": loss.detach(), "train/span_loss": span_loss.detach()}
        if predictions is not None:
            correct, scored, _ = score_predictions(predictions, part, self.task.scoring)
            num_correct = (correct & scored).sum()
            sums["train/accuracy"] = num_correct / block.num_answers if block.num_answers else math.nan
            self.progress.add_share({"accuracy": sums["train/accuracy"]}, 1, is_first=index == 0)
        self.averager.add_share(sums, 1, is_first=index == 0)
        return loss + span_loss

    def share(self, rows: slice) -> float:
        """The part of all streams that a micro-batch has."""
        return (rows.stop - rows.start) / self.config.train.batch_size

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
        streams = own_streams(config.eval.batch_size, "eval.batch_size")
        states = evaluation_states(model, config, streams.stop - streams.start)
        max_reach = model.max_reach(config.eval.span_cap)
        answers = [AnswerMetrics(task.scoring, device, max_reach) for _ in states.rows]
        averager, num_targets = RunningMeans(), 0
        stream = task.stream(split, config.eval.batch_size, config.eval.block_size)
        for batch in islice(stream, config.eval.max_blocks):
            num_targets += count_targets(batch)
            own_on_cpu = rows_of(batch, streams)
            own = to_device(own_on_cpu, device)
            timesteps = batch.tokens.shape[1]  # the last block may be shorter, and counts for less
            for index, rows in enumerate(states.rows):
                part, targets_of_part = rows_of(own, rows), count_targets(rows_of(own_on_cpu, rows))
                with autocast(config, device):
                    logits, state, metrics = model(part.tokens, states[index], part.reach, config.eval.span_cap)
                    losses, predictions = loss_and_predictions(model, logits, part, targets_of_part, task.metric)
                answers[index].add(losses, predictions, part)
                states[index] = state
                del metrics["span_loss"]
                weighted = {"timesteps": timesteps} | {name: timesteps * value for name, value in metrics.items()}
                averager.add_share(weighted, (rows.stop - rows.start) / config.eval.batch_size, is_first=index == 0)
            keep_pace()
        if not num_targets:
            raise no_targets(split, config)
        total = answers[0]
        total.sum_over_streams(answers[1:])
        if not total.nats.isfinite():
            raise ValueError(
                f"{split}/loss is {total.nats.item()}: the weights have diverged; try a lower optimizer.lr"
            )
        means = averager.means()
        timesteps_per_block = means.pop("timesteps")
        metrics = total.metrics(task.metric, task.bytes_per_token(split), task.extra_metrics)
        metrics |= {name: mean / timesteps_per_block for name, mean in means.items()}
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "stream": self.stream.state_dict(),
            "generator": self.generator.get_state(),
            "blocks": self.blocks,
            "progress": self.progress.values(),
        }

    def streams_state_dict(self) -> dict[str, Any]:
        """Nothing: what the streams read is the task's."""
        return {}

    def load_state_dict(self, state: dict[str, Any], streams_state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
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


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some streams of a batch."""
    tensors: Any = (None if tensor is None else tensor[rows] for tensor in batch)
    return Batch(*tensors)
