"""Eviction in evaluation: a trained model holds fewer memories than it was trained with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from ..memory import KeyNorm, RandomEviction, Tova
from ..memory.eviction import Eviction

EVICTIONS: dict[str, type[Eviction]] = {"key_norm": KeyNorm, "tova": Tova, "random_eviction": RandomEviction}


def check_eviction(config: DictConfig) -> None:
    """Raises ValueError unless `eval.eviction` is known and has its `eval.num_kept`."""
    name, num_kept = config.eval.eviction, config.eval.num_kept
    if name is not None and name not in EVICTIONS:
        raise ValueError(f"eval.eviction must be null or one of {', '.join(EVICTIONS)}, got {name}")
    if (name is None) != (num_kept is None):
        raise ValueError(f"eval.eviction and eval.num_kept belong together, got {name} and {num_kept}")


@contextmanager
def evicting(model: Any, config: DictConfig) -> Iterator[None]:
    """Within this context each layer evicts as `eval.eviction` says, besides what its mechanism deletes."""
    layers = model.layers
    for layer in layers if config.eval.eviction else ():
        layer.eviction = EVICTIONS[config.eval.eviction](layer.mechanism.max_span, config.eval.num_kept, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.eviction = None
