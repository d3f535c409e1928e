"""Load a run folder's task and trained model."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from ..transformer import Transformer
from .build import build_model, setup_runtime
from .run_folder import checkpoint, weights
from .run_folder.files import check_same_vocab
from .run_folder.identity import check_same_data
from .trainer import build_task, load_weights, plain

log = logging.getLogger(__name__)


class LoadedRun(NamedTuple):
    """A trained model with its task, the updates and blocks that it took, and the id of its W&B run if known."""

    config: DictConfig
    task: Any
    model: Transformer
    device: torch.device
    update: int
    blocks: int
    run_id: str | None


def load_run(folder: Path, config: DictConfig) -> LoadedRun:
    """The run's task and trained model, built from a validated config.

    Args:
        config: the run's own, or one with changes that leave the shapes of the weights as they are.

    Raises FileNotFoundError without weights, ValueError if they are of another model or vocabulary.
    """
    device = setup_runtime(config)
    loaded = read_weights(folder, config.eval.weights)
    task = build_task(config)
    if loaded.task == OmegaConf.to_container(config.task, resolve=True):  # otherwise other data are asked for
        check_same_data(folder, loaded.data, plain(task.data_info))
    check_same_vocab(folder, task)
    if loaded.task_state:
        task.load_state_dict(loaded.task_state)
    model = build_model(config, task, device)
    load_weights(model, loaded.tensors, folder)
    return LoadedRun(config, task, model.eval(), device, loaded.update, loaded.blocks, loaded.run_id)


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
        blocks, task = content["objective"].get("blocks", 0), content["config"].get("task")
        loaded = weights.Weights(
            content["model"], content["update"], blocks, task, content["data"], None, content["run_id"], content["task"]
        )
    log.info(f"weights of update {loaded.update}, from {folder}")
    return loaded
