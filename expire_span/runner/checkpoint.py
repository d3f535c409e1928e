"""Checkpoints: written whole or not at all, the last two kept, nothing but plain types in them."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

NAMES = ("checkpoint.pt", "checkpoint_previous.pt")


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint; the one before it stays beside it. Raises OSError where it does not fit on the disk."""
    current, previous = (folder / name for name in NAMES)
    part = folder / "checkpoint.pt.part"
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        part.unlink(missing_ok=True)
        why = str(error).splitlines()[0]
        raise OSError(
            f"the checkpoint of update {content['update']} could not be written to {folder} ({why}); the one before it "
            f"is kept: make room, then go on with expire-span resume={folder}"
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
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning(f"{path} cannot be read ({why[:100]})")
    if found:
        raise ValueError(f"no checkpoint in {folder} can be read; remove {' and '.join(map(str, found))} to start anew")
    return None
