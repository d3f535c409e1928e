"""A run folder opened again, for use."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..transformer import Transformer
from . import checkpoint
from .build import build_model, prepare
from .record import refuse_other_alphabet
from .training import load_weights


class Saved(NamedTuple):
    """What a run has trained, and the updates and blocks that it took."""

    config: DictConfig
    task: Any
    model: Transformer
    device: torch.device
    update: int
    blocks: int


def saved_config(run: Path) -> DictConfig:
    """Raises FileNotFoundError where this is no run folder."""
    path = run / ".hydra" / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no .hydra/config.yaml")
    return OmegaConf.load(path)  # type: ignore[return-value]


def open_run(run: Path, config: DictConfig) -> Saved:
    """The run's task and trained model by a config: its own, or that with changes which leave the weights their shapes.

    Raises FileNotFoundError without a checkpoint, and ValueError where it is of another model or alphabet.
    """
    device = prepare(config)
    content = checkpoint.load(run)
    if content is None:
        raise FileNotFoundError(f"{run} has no checkpoint.pt; name the folder of a run that has saved one")
    task = instantiate(config.task)
    refuse_other_alphabet(run, task)
    model = build_model(config, task, device)
    load_weights(model, content, run)
    return Saved(config, task, model.eval(), device, content["update"], content["blocks"])
