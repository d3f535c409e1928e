"""Checkpoints: written atomically, the last two kept, made of tensors and plain types only."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

NAMES = ("checkpoint.pt", "checkpoint_previous.pt")
FORMAT = 2  # 1, without this entry, was written by versions before 0.2, which had other names


def save(folder: Path, content: dict[str, Any]) -> None:
    """Replace the checkpoint and keep the one before it. Raises OSError if the disk is full."""
    current, previous = (folder / name for name in NAMES)
    part = folder / "checkpoint.pt.part"
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        part.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(
            f"the checkpoint of update {content['update']} could not be written to {folder} ({reason}); the one before "
            f"it is kept: free some space, then resume with expire-span resume={folder}"
        ) from None
    if current.exists():
        os.replace(current, previous)
    os.replace(part, current)


def load(folder: Path) -> dict[str, Any] | None:
    """The last readable checkpoint, on the CPU; None if there is none at all.

    Raises ValueError if there are checkpoints and none of them can be read, or if an older version wrote them.
    """
    paths = [folder / name for name in NAMES if (folder / name).exists()]
    for path in paths:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise errors of many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning(f"{path} cannot be read ({reason[:100]})")
            continue
        if content.get("format") != FORMAT:
            raise ValueError(written_by_older_version(folder))
        return content
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read; remove {' and '.join(map(str, paths))} to start over")
    return None


def written_by_older_version(folder: Path) -> str:
    return (
        f"{folder} was written by expire-span 0.1, which had other names for settings and weights; "
        "open it with that version (git checkout a0984c4), or train it again"
    )
