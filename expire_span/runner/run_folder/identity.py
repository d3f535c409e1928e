"""Which run a folder holds: a folder belongs to one config and one text, so that its curve has one meaning."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.overrides import is_below

# Keys that may change between two starts of one run, because they do not change what an update computes.
MAY_CHANGE = (
    "train.updates",
    "train.micro_batch_size",
    "train.offload_memory",
    "transformer.attention_backend",
    "transformer.activation_checkpointing",
    "eval",
    "run",
    "wandb",
    "tracker",
    "evaluate",
    "resume",
    "paper",
    "simplified",
    "milestones",
)
NOT_IN_RUN = ("run.precision",)  # of the section `run`, these may not
# Keys that resume=RUN may change on purpose, for example after the training has diverged.
MAY_CHANGE_IN_RESUME = (*MAY_CHANGE, "optimizer", "lr_schedule", "alpha_schedule", "train.grad_clip")
# Keys that evaluate=RUN may change: the data, and how it is evaluated. All others are how the run was trained.
CHANGED_BY_EVALUATION = ("task", "eval", "run", "wandb", "tracker", "transformer.attention_backend")


def check_same_run(
    folder: Path, saved: Mapping[str, Any], config: Mapping[str, Any], changeable: Sequence[str]
) -> None:
    """Raises ValueError, naming the keys, if the folder's run has other values than the config.

    Args:
        folder: the run folder.
        saved: the config of its checkpoint.
        config: the present config, resolved, as plain values.
        changeable: sections and keys that may differ.
    """
    contradictions: dict[str, str] = {}  # by the last part of the key: model.alpha follows memory.alpha
    for key, old, _ in changes(saved, config):
        if not is_below(key, changeable) or key in NOT_IN_RUN or key.endswith("_target_"):
            contradictions.setdefault(key.rpartition(".")[2], f"{key}={'null' if old is None else old}")
    if contradictions:
        values = ", ".join(contradictions.values())
        how = f"go on with the run's own settings by resume={folder}"
        if list(contradictions) == ["precision"]:  # resume=RUN has it too, where `auto` has become another one here
            how = f"set {values} (what auto is depends on the device)"
        raise ValueError(f"{folder} holds a run with {values}; use another hydra.run.dir, or {how}")


def check_same_data(folder: Path, saved: Any, data: Any) -> None:
    """Raises ValueError if the text or generated data of the folder's run is not that of the task.

    Args:
        saved, data: `Task.data_info` of the run and of the present task.
    """
    for key, old, new in changes({"data": saved}, {"data": data}):
        if not key.startswith("data.files"):  # which files were read and skipped; the hash tells their content
            raise ValueError(
                f"the data of {folder} has changed ({key} was {old}, is {new}): restore it, or train on it in another "
                "hydra.run.dir"
            )


def changes(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value wherever two nested dictionaries differ; None for what one of them lacks."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new
