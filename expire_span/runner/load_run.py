"""Load a run folder's config, task and trained model."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from ..transformer import Transformer
from .build import build_model, setup_runtime
from .run_folder import checkpoint, weights
from .run_folder.files import check_same_vocab
from .trainer import build_task, load_weights

log = logging.getLogger(__name__)


class LoadedRun(NamedTuple):
    """A trained model with its task, and the updates and blocks that it took."""

    config: DictConfig
    task: Any
    model: Transformer
    device: torch.device
    update: int
    blocks: int


def load_config(folder: Path) -> DictConfig:
    """The config of a run, as it was saved.

    Raises FileNotFoundError if this is not a run folder, ValueError if a version before 0.2 wrote it.
    """
    path = folder / ".hydra" / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no .hydra/config.yaml")
    config = OmegaConf.load(path)
    if "optimiser" in config:
        raise ValueError(checkpoint.written_by_older_version(folder))
    return config  # type: ignore[return-value]


def load_run(folder: Path, config: DictConfig) -> LoadedRun:
    """The run's task and trained model, built from a validated config.

    Args:
        config: the run's own, or one with changes that leave the shapes of the weights as they are.

    Raises FileNotFoundError without weights, ValueError if they are of another model or vocabulary.
    """
    device = setup_runtime(config)
    loaded = read_weights(folder, config.eval.weights)
    task = build_task(config)
    check_same_vocab(folder, task)
    model = build_model(config, task, device)
    load_weights(model, loaded.tensors, folder)
    return LoadedRun(config, task, model.eval(), device, loaded.update, loaded.blocks)


def read_weights(folder: Path, which: str) -> weights.Weights:
    """The best weights of a run, or the last: if their own file is missing or damaged, those of the checkpoint."""
    path = folder / weights.FILES[which]
    try:
        loaded = weights.load(path)
    except ValueError as error:
        if which == "best":
            raise
        log.warning(f"{error}; the weights of the checkpoint are used")
        loaded = None
    if loaded is None and which == "best":
        raise FileNotFoundError(f"{path} does not exist: only a run with eval.interval=N keeps its best weights")
    if loaded is None:
        content = checkpoint.load(folder)
        if content is None:
            raise FileNotFoundError(f"{folder} has no weights; name the folder of a run that has saved a checkpoint")
        loaded = weights.Weights(content["model"], content["update"], content["objective"].get("blocks", 0))
    log.info(f"weights of update {loaded.update}, from {folder}")
    return loaded
