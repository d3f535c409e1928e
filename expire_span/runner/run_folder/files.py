"""The files of a run folder beside its checkpoints (checkpoint.py).

.hydra/         the config, and how it was composed
metrics.jsonl   one JSON object a line, numbers only; "update" says when
summary.json    the final metrics, and the protocol and provenance that gave them
vocab.json      the characters or words that the tokens stand for, in order
diff.patch      what the checkout had beyond its commit, if anything
.lock           locked by the process that writes here, with its process id
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Lock a run folder against other processes. Raises ValueError if it is in use.

    The system releases the lock when the process ends, however it ends. Where the file system has no locks, as on some
    clusters, the folder is used without one.
    """
    path = Path(folder) / ".lock"
    for name in (".lock", ".hydra", "metrics.jsonl", "run.log", "tensorboard"):
        if (Path(folder) / name).is_symlink():
            raise ValueError(f"{Path(folder) / name} is a link, and what it points to would be overwritten; remove it")
    file_lock = FileLock(path, timeout=0)
    try:
        file_lock.acquire()
    except Timeout:
        process = ""
        with suppress(FileNotFoundError):  # it is just being removed, see below
            process = path.read_text(errors="replace").strip()
        raise ValueError(
            f"run folder {folder} is in use by process {process or 'unknown'}; wait for it, or choose another "
            "hydra.run.dir"
        ) from None
    except (FileNotFoundError, FileExistsError):
        raise ValueError(f"run folder {folder} was removed by another start, which was refused; try again") from None
    except (NotImplementedError, OSError):
        yield
        return
    try:
        with suppress(OSError), open(path, "r+", opener=open_without_links) as file:
            if os.fstat(file.fileno()).st_nlink == 1:  # else another name of the same file would be overwritten
                file.truncate()
                file.write(str(os.getpid()))
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [".lock"]:  # a start that was refused leaves nothing
                path.unlink()  # while it is locked: filelock gives nobody the lock of a file that was removed
        file_lock.release()


def open_without_links(path: str, flags: int) -> int:
    """An opener for `open` that follows no link from a run folder to a file elsewhere."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_regular(folder: Path) -> None:
    """Raises ValueError for a pipe or device in a run folder of somebody else: reading it could go on for ever."""
    for path in (path for part in (folder, folder / ".hydra") if part.is_dir() for path in part.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is a pipe or a device, and no file of a run; remove it")


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts, given by their paths in the folder."""
    for name, text in texts.items():
        with explain_write_error(folder / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text.encode())


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json. NaN and infinity become null, which every JSON reader understands."""
    text = json.dumps(_nonfinite_to_none(summary), indent=2, allow_nan=False) + "\n"
    write_atomically(Path(folder) / "summary.json", text.encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of summary.json, null for NaN. Raises ValueError if it is damaged."""
    return _read_json(Path(folder) / "summary.json", dict)


def write_vocab(folder: Path, task: Any) -> None:
    """Write the characters or words that a task's tokens stand for, if it has any."""
    if task.vocab is not None:
        write_atomically(Path(folder) / "vocab.json", json.dumps(list(task.vocab), ensure_ascii=False).encode())


def check_same_vocab(folder: Path, task: Any) -> None:
    """Raises ValueError if the tokens of the folder's run stand for other characters or words than the task's."""
    path, vocab = Path(folder) / "vocab.json", list(task.vocab or [])
    saved_vocab = _read_json(path, list) if path.exists() else vocab
    if saved_vocab != vocab:
        raise ValueError(
            f"{path} has {len(saved_vocab):,} characters or words, which are not the {len(vocab):,} of the task's "
            "text: use the text that the run was trained on, or another hydra.run.dir"
        )


def append_metrics(path: Path, row: Mapping[str, float]) -> None:
    """Append one line of numbers to metrics.jsonl."""
    line = json.dumps({name: _check_number(name, value) for name, value in row.items()}, allow_nan=False) + "\n"
    with explain_write_error(path), open(path, "a", encoding="utf-8", opener=open_without_links) as file:
        file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, null as NaN. A last line that a killed run left half-written is skipped.

    Raises ValueError for any other line that is no row of numbers.
    """
    return [
        {name: math.nan if value is None else value for name, value in row.items()} for _, row in _complete_rows(path)
    ]


def truncate_metrics(path: Path, update: int, last_update: int) -> None:
    """Remove rows logged after `update`, so that a run that resumes from there logs them once.

    A run that resumes from its last update evaluates again, so its final row is removed as well.
    """
    if Path(path).exists():
        rows = [(line, row) for line, row in _complete_rows(path) if row["update"] <= update]
        kept = [line + b"\n" for line, row in rows if row["update"] != last_update or not _is_final_row(row)]
        write_atomically(Path(path), b"".join(kept))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a crash or a full disk leaves the old content or the new one, never a mixture."""
    with replace_file(path) as file:
        file.write(content)


@contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new, empty file, which takes the place of `path` once it is complete and on the disk."""
    part = path.with_name(path.name + ".part")
    try:
        with explain_write_error(path):
            part.unlink(missing_ok=True)  # with "x" below: a link of this name is not followed
            with open(part, "x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names of a folder's files outlive a loss of power, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class WriteError(OSError):
    """A file of a run folder could not be written."""


@contextmanager
def explain_write_error(path: Path) -> Iterator[None]:
    """Make a failed write say which file it was."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} could not be written ({error.strerror or error})") from None


def _is_final_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is that of the end of a run, which has times but, unlike that of a logging interval, no loss."""
    return "train/loss" not in row and any(name.startswith("perf/") for name in row)


def _complete_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            row = None
        if not _is_row(row):
            raise ValueError(f"{path}: line {number} is no row of metrics: {line[:60]!r}; remove it by hand")
        yield line, row


def _is_row(row: Any) -> bool:
    """Whether JSON is what `append_metrics` writes: numbers, of which the update is an integer."""
    if not isinstance(row, dict) or not isinstance(row.get("update"), int):
        return False
    return all(isinstance(value, int | float | None) for value in row.values())


def _read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file. Raises ValueError if it is damaged, or of another kind."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} is damaged: it holds {type(content).__name__}, not {kind.__name__}")
    return content


def _check_number(name: str, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {name!r} must be a number, got {value!r} ({type(value).__name__})")
    return int(value) if isinstance(value, Integral) else _nonfinite_to_none(float(value))


def _nonfinite_to_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nonfinite_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
