"""What a model does with one block of a task. A step returns the loss, the carried state and figures to be averaged."""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expire_span.tasks.stream import IGNORED, Batch

from ..transformer import State
from .measures import judged


def predict(
    model: nn.Module, batch: Batch, state: State, alpha: float, per_block: bool
) -> tuple[Tensor, State, dict[str, Any]]:
    """Each target from what came before it.

    alpha: what the span loss is multiplied by, beyond its own weight; per_block: see `judged`.
    """
    scores, state, figures = model(batch.tokens, state, batch.reach)  # (B, T, classes)
    loss = cross_entropy(scores.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)
    right, asked, _ = judged(scores, batch, per_block)
    span_loss = figures.pop("span_loss")
    accuracy = (right & asked).sum() / asked.sum()
    return loss + alpha * span_loss, state, {"train/loss": loss.detach(), "train/accuracy": accuracy, **figures}
