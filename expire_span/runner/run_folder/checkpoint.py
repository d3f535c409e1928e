"""Checkpoints: checkpoint_UPDATE.pt, written atomically and verified on loading; tensors and plain types only.

A file is what torch.save writes, followed by its SHA-256, so that damage at any place is found.
"""

import hashlib
import logging
import re
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .config_files import written_by_older_version
from .files import replace_file

log = logging.getLogger(__name__)

FORMAT = 3  # 1, without this entry, was written by versions before 0.2, which had other names
DIGEST_SIZE = hashlib.sha256().digest_size
ENTRY_TYPES: dict[str, Any] = {
    "format": int,
    "update": int,
    "run_id": str,
    "config": dict,
    "data": (dict, type(None)),
    "changes": list,
    "model": dict,
    "optimizer": dict,
    "objective": dict,
    "task": dict,
    "step": torch.Tensor,
    "layers": list,
    "metrics": dict,
    "rng": torch.Tensor,
    "rng_cuda": list,
}


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    numbered = [(re.fullmatch(r"checkpoint_(\d+)\.pt", path.name), path) for path in Path(folder).glob("*.pt")]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)]


def save(folder: Path, content: dict[str, Any], keep: int = 2) -> None:
    """Write the checkpoint of content["update"], then remove all but the `keep` newest up to this update.

    A file of a later update is removed too: it was damaged, or the run would have gone on from there.

    Raises:
        OSError: It could not be written, such as on a full disk; those before it stay.
    """
    for unfinished in folder.glob("checkpoint_*.pt.part"):  # of a process that was killed
        unfinished.unlink()
    new = folder / f"checkpoint_{content['update']}.pt"
    with replace_file(new) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch reports a full disk as this or as OSError
            raise OSError(str(error).splitlines()[0]) from None
        file.write(sha256(file, file.tell()))
    older = [path for path in paths(folder) if update_of(path) < content["update"]]
    for path in set(paths(folder)) - {new, *older[: keep - 1]}:
        path.unlink()


def load(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is not damaged, on the CPU; None if there is none at all.

    Raises:
        OSError: A checkpoint cannot be opened, which says nothing about its content.
        ValueError: All of them are damaged, or the newest one that is not is of no use to this version.
    """
    candidates = paths(folder)
    if not candidates and (folder / "checkpoint.pt").exists():
        raise ValueError(written_by_older_version(folder))
    for path in candidates:
        if is_intact(path):
            return read(path)
        log.warning(f"{path} is damaged, and the checkpoint before it is used")
    if candidates:
        names = " and ".join(str(path) for path in candidates)
        raise ValueError(f"no checkpoint in {folder} is intact; remove {names} to start over")
    return None


def is_intact(path: Path) -> bool:
    """Whether the file is as it was written. Raises OSError if it cannot be opened."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2) - DIGEST_SIZE
            return size > 0 and sha256(file, size) == file.read()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from None


def read(path: Path) -> dict[str, Any]:
    """The content of an intact checkpoint. Raises ValueError unless it is one of this version, with every entry."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever else was given this name and a digest raises errors of many kinds
        raise ValueError(f"{path} is not a checkpoint of this version ({short_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise ValueError(f"{path} has format {found}, but this version of expire-span reads format {FORMAT}")
    for name, kind in ENTRY_TYPES.items():
        if name not in content:
            raise ValueError(f"{path} is not a checkpoint: its {name} is missing")
        if not isinstance(content[name], kind):
            raise ValueError(f"{path} is not a checkpoint: its {name} is a {type(content[name]).__name__}")
    return content


def how_to_go_on(folder: Path) -> str:
    """What is saved, and the command that goes on from there."""
    saved = paths(folder)
    if not saved:
        return "nothing is saved yet: run the same command again"
    return f"update {update_of(saved[0])} is saved; to resume: expire-span {shlex.quote(f'resume={folder}')}"


def update_of(path: Path) -> int:
    """The update of a checkpoint, by its name."""
    return int(path.stem.removeprefix("checkpoint_"))


def sha256(file: BinaryIO, size: int) -> bytes:
    """The SHA-256 of the first bytes of a file, which is left at their end."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(min(size, 2**20)):
        digest.update(chunk)
        size -= len(chunk)
    return digest.digest()


def short_reason(error: Exception) -> str:
    """An error's type and the start of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
