"""Checkpoints: written whole or not at all, the last two kept, nothing but plain types in them."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

NAMES = ("checkpoint.pt", "checkpoint_previous.pt")


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint; the one before it stays as checkpoint_previous.pt. Raises OSError where it does not fit."""
    current, previous = (folder / name for name in NAMES)
    part = folder / "checkpoint.pt.part"
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        part.unlink(missing_ok=True)
        raise OSError(
            f"the checkpoint of update {content['update']} could not be written to {folder} ({str(error).splitlines()[0]}); "
            f"the one before it is kept: make room, then continue with `expire-span resume={folder}`"
        ) from None
    if current.exists():
        os.replace(current, previous)
    os.replace(part, current)


def load(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint that can be read, on the CPU; None where there is none at all.

    Raises ValueError if there are some and none can be read.
    """
    found = [folder / name for name in NAMES if (folder / name).exists()]
    for path in found:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file provokes
            log.warning("%s cannot be read (%s); trying the one before it", path, str(error).splitlines()[0])
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; remove {' and '.join(map(str, found))} to start anew")
    return None
