"""Checkpoints: checkpoint_UPDATE.pt, written atomically and verified on loading; tensors and plain types only.

A file is what torch.save writes, followed by its SHA-256, so that damage at any place is found. Where several ranks
train, each writes what belongs to its streams to a file of its own, checkpoint_UPDATE.rank_N_of_M.pt. A checkpoint of
which one of these is missing or damaged counts as damaged.
"""

import hashlib
import logging
import re
import shlex
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import ranks
from .config_files import written_by_older_version
from .files import replace_file

log = logging.getLogger(__name__)

FORMAT = 4  # 1, without this entry, was written by versions before 0.2, which had other names
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
    "metrics": dict,
    "num_ranks": int,
    "save_id": str,  # which the files of all ranks share
    "streams": list,  # what belongs to the streams, if there was one rank
}


def paths(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    numbered = [(re.fullmatch(r"checkpoint_(\d+)\.pt", path.name), path) for path in Path(folder).glob("*.pt")]
    return [path for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True)]


def save(folder: Path, content: dict[str, Any], streams: dict[str, Any]) -> None:
    """Write the checkpoint of content["update"], see `prune` for the older ones.

    Args:
        content: What all ranks have in common; rank 0 writes it.
        streams: What belongs to this rank's streams.

    Raises:
        OSError: It could not be written, such as on a full disk; those before it stay.
    """
    path = folder / f"checkpoint_{content['update']}.pt"
    if content["num_ranks"] > 1:
        write(rank_path(path, ranks.rank(), content["num_ranks"]), streams)
    if ranks.is_main():
        write(path, content | {"streams": [streams] if content["num_ranks"] == 1 else []})


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file, and its SHA-256 at its end."""
    with replace_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch reports a full disk as this or as OSError
            raise OSError(str(error).splitlines()[0]) from None
        file.write(sha256(file, file.tell()))


def prune(folder: Path, update: int, keep: int) -> None:
    """Remove all checkpoints but that of this update and the newest before it, `keep` in all.

    One of a later update is removed too: it was damaged, or the run would have gone on from there.
    """
    for unfinished in folder.glob("checkpoint_*.pt.part"):  # of a process that was killed
        unfinished.unlink()
    kept = [path for path in paths(folder) if update_of(path) <= update][:keep]
    for path in set(paths(folder)) - set(kept):
        remove(path)
    updates = {update_of(path) for path in kept}
    for path in folder.glob("checkpoint_*.rank_*.pt"):  # of a checkpoint that is gone, or was never finished
        if update_of(path) not in updates:
            path.unlink()


def remove(path: Path) -> None:
    """Remove a checkpoint with the files of all its ranks."""
    path.unlink()
    for part in path.parent.glob(f"{path.stem}.rank_*.pt"):
        part.unlink()


def rank_path(path: Path, rank: int, num_ranks: int) -> Path:
    """The file of a rank's streams."""
    return path.with_name(f"{path.stem}.rank_{rank}_of_{num_ranks}.pt")


def is_complete(path: Path) -> bool:
    """Whether the files of all ranks are there, if there were several."""
    parts = list(path.parent.glob(f"{path.stem}.rank_0_of_*.pt"))  # written before the checkpoint itself
    num_ranks = max((int(part.stem.rpartition("_")[2]) for part in parts), default=0)
    return all(rank_path(path, rank, num_ranks).exists() for rank in range(num_ranks))


def load(folder: Path, own_streams: slice | None = None) -> dict[str, Any] | None:
    """The newest checkpoint that is not damaged, on the CPU; None if there is none at all. All ranks load together.

    Args:
        own_streams: Of which the content's "streams" are wanted, in as many parts as other ranks had saved of them
            (None: of none).

    Raises:
        OSError: A checkpoint cannot be opened, which says nothing about its content.
        ValueError: All of them are damaged, or the newest one that is not is of no use to this version.
    """
    candidates = ranks.broadcast(paths(folder))
    if not candidates and (folder / "checkpoint.pt").exists():
        raise ValueError(written_by_older_version(folder))
    for path in candidates:
        with ranks.failing_together():
            content = read_if_intact(path, own_streams)
        if all(ranks.gather(content is not None)):
            return content
        log.warning(f"{path} is damaged, and the checkpoint before it is used")
    if candidates:
        names = " and ".join(str(path) for path in candidates)
        raise ValueError(f"no checkpoint in {folder} is intact; remove {names} to start over")
    return None


def read_if_intact(path: Path, own_streams: slice | None) -> dict[str, Any] | None:
    """A checkpoint with the parts that hold some of `own_streams`; None if a file of it is damaged or missing."""
    if not is_intact(path):
        return None
    content = read(path, ENTRY_TYPES)
    if own_streams is None or content["num_ranks"] == 1:
        return content
    num_streams = content["config"]["train"]["batch_size"] // content["num_ranks"]
    for rank in range(own_streams.start // num_streams, -(-own_streams.stop // num_streams)):
        part = rank_path(path, rank, content["num_ranks"])
        if not part.exists() or not is_intact(part):
            return None
        content["streams"].append(read(part, {}))
        if content["streams"][-1].get("save_id") != content["save_id"]:  # another time that this update was saved
            return None
    return content


def is_intact(path: Path) -> bool:
    """Whether the file is as it was written. Raises OSError if it cannot be opened."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2) - DIGEST_SIZE
            return size > 0 and sha256(file, size) == file.read()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from None


def read(path: Path, entry_types: dict[str, Any]) -> dict[str, Any]:
    """The content of an intact file. Raises ValueError unless it is one of this version, with every entry."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever else was given this name and a digest raises errors of many kinds
        raise ValueError(f"{path} is not a checkpoint of this version ({short_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a dict")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise ValueError(f"{path} has format {found}, but this version of expire-span reads format {FORMAT}")
    for name, kind in entry_types.items():
        if name not in content:
            raise ValueError(f"{path} is not a checkpoint: its {name} is missing")
        if not isinstance(content[name], kind):
            raise ValueError(f"{path} is not a checkpoint: its {name} is a {type(content[name]).__name__}")
    return content


def how_to_go_on(folder: Path) -> str:
    """What is saved, and the command that goes on from there."""
    saved = [path for path in paths(folder) if is_complete(path)]
    if not saved:
        return "nothing is saved yet: run the same command again"
    return f"update {update_of(saved[0])} is saved; to resume: expire-span {shlex.quote(f'resume={folder}')}"


def update_of(path: Path) -> int:
    """The update of a checkpoint, or of a rank's part of it, by its name."""
    return int(path.name.split(".")[0].removeprefix("checkpoint_"))


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
