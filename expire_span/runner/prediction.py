"""The kind of task whose streams can be read on: predict each target from what came before it.

A kind is a module with `source`, `step`, `interval` and `evaluate`; the other one is `actor_critic`.
"""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.stream import IGNORED, Batch, Stream

from .build import precision
from .measures import SHARES, Answers, Figures, Meter, in_terms_of, judged

if TYPE_CHECKING:
    from .training import Training

log = logging.getLogger(__name__)


def source(task: Any, config: DictConfig, device: torch.device) -> Stream:
    """What training reads. Raises ValueError now for what evaluation would only find at the end."""
    for split in {*config.splits, *(["valid"] if config.evaluation.every else [])}:
        task.stream(split, config.evaluation.batch, config.evaluation.block)
    return task.stream("train", config.train.batch, config.train.block)


def step(training: "Training", alpha: float) -> tuple[Tensor, dict[str, Any]]:
    """The loss of the next block, and its figures. alpha multiplies the span loss, beyond its own weight."""
    batch, number = next_asked(training)
    with precision(training.config, training.device):
        scores, training.state, figures = training.forward(batch.tokens, training.state, batch.reach)
        losses, best = answered(training.model, scores, batch, number, training.task.measure)  # (n,), (B, T)
    loss, span_loss = losses.mean(), figures.pop("span_loss")
    figures["train/loss"] = loss.detach()
    if best is not None:
        right, asked, _ = judged(best, batch, training.task.answer)
        figures["train/accuracy"] = (right & asked).sum() / asked.sum()
    return loss + alpha * span_loss, figures


def answered(
    model: Any, scores: Tensor, batch: Batch, number: int, measure: str
) -> tuple[Tensor, Tensor | None]:
    """Nats of the targets that are asked for, (n,), `number` of them, and what the model answers everywhere, (B, T).

    The answers are None where the measure is not about them: of a large vocabulary the likeliest word is not for free.
    """
    targets = batch.targets.flatten()
    rows = (targets != IGNORED).nonzero_static(size=number).squeeze(1)  # (n,): without waiting for the device
    losses = model.output.losses(scores.flatten(0, 1)[rows], targets[rows])
    return losses, model.output.best(scores.detach()) if measure in SHARES else None


def asked_in(batch: Batch) -> int:
    """How many targets are asked for."""
    return int((batch.targets != IGNORED).sum())


def next_asked(training: "Training") -> tuple[Batch, int]:
    """The next block with a target, and how many it has. Those before it only become memories.

    Where nothing is asked nothing is learned, and the spans of such a block should not be pulled down either: nothing
    in it could pull them up.
    """
    while True:
        batch = next(training.source)
        training.blocks += 1
        there = to_device(batch, training.device)
        if number := asked_in(batch):
            return there, number
        with torch.no_grad(), precision(training.config, training.device):
            _, training.state, figures = training.forward(there.tokens, training.state, there.reach)
        del figures["span_loss"]
        training.meter.add(figures)


@torch.no_grad()
def evaluate(model: Any, task: Any, split: str, config: DictConfig, device: torch.device) -> Figures:
    """The split from its beginning to its end, each stream from empty memories on: figures named split/..."""
    model.eval()
    settings = config.evaluation
    answers, meter = Answers(task.answer, device), Meter()
    state = model.initial_state(settings.batch)
    for number, batch in enumerate(task.stream(split, settings.batch, settings.block)):
        if number == settings.blocks:
            break
        asked, batch = asked_in(batch), to_device(batch, device)
        with precision(config, device):
            scores, state, figures = model(batch.tokens, state, batch.reach)
            answers.add(*answered(model, scores, batch, asked, task.measure), batch)
        del figures["span_loss"]
        timesteps = batch.tokens.shape[1]  # a last block may be shorter
        meter.add({"timesteps": timesteps, **{name: timesteps * figure for name, figure in figures.items()}})
    if not answers.counts[0]:
        log.warning(f"nothing is asked in the first {settings.blocks} blocks of {split}: raise evaluation.blocks")
    also, means = getattr(task, "also", ()), meter.means()
    timesteps = means.pop("timesteps")
    figures = answers.figures(task.measure, bytes_per_token(task, split), also)
    figures |= {name: mean / timesteps for name, mean in means.items()}
    return {f"{split}/{name}": figure for name, figure in figures.items()}


def interval(training: "Training", means: Figures) -> Figures:
    """Training's own figures out of the means of what `step` gave; the task hears how well it went."""
    task, accuracy = training.task, means.pop("train/accuracy", math.nan)
    figure = in_terms_of(task.measure, means["train/loss"], accuracy, bytes_per_token(task, "train"))
    figures = {**means, f"train/{task.measure}": figure}
    if hasattr(task, "feedback"):
        figures["train/stage"] = task.stage
        task.feedback(accuracy)
    return figures


def bytes_per_token(task: Any, split: str) -> float:
    return task.bytes_per_token(split) if hasattr(task, "bytes_per_token") else 1.0


def to_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in batch))
