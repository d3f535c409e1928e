"""What a model does with one block of a task. A step returns the loss, the carried state and figures to be averaged."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from expire_span.tasks.stream import Batch

from ..transformer import State
from .measures import judged, loss_of


def predict(
    model: Callable, batch: Batch, state: State, alpha: float, answer: str
) -> tuple[Tensor, State, dict[str, Any]]:
    """Each target from what came before it.

    alpha: what the span loss is multiplied by, beyond its own weight; answer: the task's, see `judged`.
    """
    scores, state, figures = model(batch.tokens, state, batch.reach)  # (B, T, classes)
    loss = loss_of(scores, batch)
    right, asked, _ = judged(scores, batch, answer)
    span_loss = figures.pop("span_loss")
    accuracy = (right & asked).sum() / asked.sum()
    return loss + alpha * span_loss, state, {"train/loss": loss.detach(), "train/accuracy": accuracy, **figures}
