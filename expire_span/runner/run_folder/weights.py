"""A run's weights as safetensors, for evaluation and other programs: those of the last checkpoint, and the best ones.

The metadata hold the update, and the SHA-256 of everything else, so that damage is found.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from .checkpoint import FORMAT
from .files import write_atomically

FILES = {"last": "model.safetensors", "best": "best.safetensors"}  # by the value of eval.weights


class Weights(NamedTuple):
    """A model's weights, the updates and blocks of training that they took, and on which data."""

    tensors: Mapping[str, Tensor]
    update: int
    blocks: int
    task: Any = None  # the section of the config
    data: Any = None  # Task.data_info, as JSON has it
    value: float | None = None  # of the task's metric on the validation split, if they are the best
    run_id: str | None = None  # of the W&B run that trained them; files of earlier versions do not have it
    task_state: Any = None  # Task.eval_state_dict; files of earlier versions do not have it


def save(path: Path, weights: Weights) -> None:
    """Replace the file at once. Raises OSError if it cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors.items()}
    about = {name: value for name, value in weights._asdict().items() if name != "tensors"}
    metadata = {"format": "pt", "expire_span_format": str(FORMAT), "run": json.dumps(about)}
    metadata["sha256"] = sha256(tensors, metadata)
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: Path) -> Weights | None:
    """The weights in a file, on the CPU; None if there is no such file.

    Raises:
        ValueError: It is damaged, or of another version.
        OSError: It cannot be opened.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError):
        raise ValueError(f"{path} is damaged") from None
    if metadata.pop("sha256", "") != sha256(tensors, metadata):
        raise ValueError(f"{path} is damaged, or was not written by expire-span")
    if (found := metadata.get("expire_span_format")) != str(FORMAT):
        raise ValueError(f"{path} has format {found}, but this version reads format {FORMAT}")
    try:
        return Weights(tensors, **json.loads(metadata["run"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} was not written by expire-span") from None


def sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """The SHA-256 of names, types, shapes, values and metadata."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()
