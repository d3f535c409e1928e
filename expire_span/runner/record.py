"""What a run leaves behind beside its weights: where it came from, its figures, and who is writing them.

    .hydra/         its config, and how that was composed
    metrics.jsonl   one JSON object a line, numbers only; "update" says when
    summary.json    the final figures, and the protocol and provenance that gave them
    alphabet.json   what the tokens of a text stand for, in order
    diff.patch      what the checkout had beyond its commit, if anything
    .lock           held by the process that writes here
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("numpy", "hydra-core", "expire-span", "triton")
DIFF_LIMIT = 5 * 2**20  # bytes


# Provenance

def provenance(argv: Sequence[str] | None = None, checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Command line, commit, versions and start (UTC) of this process; without a checkout, commit and dirty are None."""
    commit = _commit(checkout)
    return {
        "command": command_line(sys.argv if argv is None else argv),
        "commit": commit,
        "dirty": bool(_git(checkout, "status", "--porcelain", "--", ".")) if commit else None,
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it in a shell, without the folder that the program lies in."""
    program = Path(argv[0])
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that decide a figure; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["torch"] = str(torch.__version__)  # with its local tag, which says whose build it is
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write texts by their paths in the folder, each whole or not at all."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _replace(folder / name, text.encode())


def write_diff(folder: Path, checkout: Path = CHECKOUT) -> Path | None:
    """Write diff.patch for `git apply` on the commit, headed by the names of untracked files; a clean tree has none."""
    path = Path(folder) / "diff.patch"
    diff = untracked = b""
    if _commit(checkout):
        diff = _git(checkout, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--", ".") or b""
        untracked = _git(checkout, "ls-files", "--others", "--exclude-standard") or b""
    if not diff and not untracked:
        path.unlink(missing_ok=True)  # of an earlier start in this folder: it would belie the summary's commit
        return None
    header = b"".join(b"# untracked: %s\n" % name for name in untracked.splitlines())
    if len(diff) > DIFF_LIMIT:
        header += b"# cut: the first %d of %d bytes, too few to apply\n" % (DIFF_LIMIT, len(diff))
    _replace(path, header[:DIFF_LIMIT] + diff[:DIFF_LIMIT])
    return path


def _commit(checkout: Path) -> str | None:
    """Commit of the checkout, if it is this project's own: an installed copy may lie in someone else's repository."""
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError):
        return None
    if project != "expire-span" or not _git(checkout, "ls-files", "pyproject.toml"):
        return None
    commit = _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    return commit.decode().strip() if commit else None


def _git(checkout: Path, *arguments: str) -> bytes | None:
    """Output of a git command; None where git is missing or refuses."""
    # Within a git hook these point to the hook's repository.
    elsewhere = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    try:
        return subprocess.run(
            ["git", "-C", str(checkout), *arguments], env=environment, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


# Figures

def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json whole or not at all; NaN and infinity become null, which every JSON reader knows."""
    text = json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"
    _replace(Path(folder) / "summary.json", text.encode())


def write_alphabet(folder: Path, task: Any) -> None:
    """Write the characters or words that a task's tokens stand for, if it knows any."""
    if hasattr(task, "alphabet"):
        _replace(Path(folder) / "alphabet.json", json.dumps(list(task.alphabet), ensure_ascii=False).encode())


def refuse_other_alphabet(folder: Path, task: Any) -> None:
    """Raises ValueError where the tokens of the folder's run stand for other characters or words than the task's."""
    path, alphabet = Path(folder) / "alphabet.json", list(getattr(task, "alphabet", []))
    before = json.loads(path.read_bytes()) if path.exists() else alphabet
    if before != alphabet:
        raise ValueError(
            f"{path} has {len(before):,} characters or words, and not the {len(alphabet):,} of the task's text: "
            "use the text that the run was trained on, or another hydra.run.dir"
        )


def append_metrics(path: Path, row: Mapping[str, float]) -> None:
    """Add one line of numbers to metrics.jsonl."""
    line = json.dumps({key: _number(key, value) for key, value in row.items()}, allow_nan=False) + "\n"
    with _said(path), open(path, "a", encoding="utf-8") as file:
        file.write(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, null as NaN. A last line that a killed run left half-written is passed over."""
    return [
        {key: math.nan if value is None else value for key, value in row.items()} for _, row in _complete_lines(path)
    ]


def truncate_metrics(path: Path, update: int, end: int) -> None:
    """Forget what was logged after `update`, so that a run that resumes there logs it once.

    end: the last update; a run that resumes there logs its final figures again.
    """
    if Path(path).exists():
        rows = [(line, row) for line, row in _complete_lines(path) if row.get("update", update) <= update]
        kept = [line + b"\n" for line, row in rows if row.get("update") != end or not _final(row)]
        _replace(Path(path), b"".join(kept))


def _final(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a run's end: that has times, as those of intervals, but no loss."""
    return "train/loss" not in row and any(name.startswith("perf/") for name in row)


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    lines = Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise ValueError(f"{path}: line {number} is not JSON: {line[:60]!r}; remove it by hand") from None
        yield line, row


def _number(key: str, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"metric {key!r} must be a number, got {value!r} ({type(value).__name__})")
    return int(value) if isinstance(value, Integral) else _finite(float(value))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, a crash or a full disk meets the old content or the new, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        with _said(path), open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """A write that fails says which file, and what is not lost."""
    try:
        yield
    except OSError as error:
        folder = Path(path).parent
        raise OSError(
            f"{path} could not be written ({error.strerror}); the last checkpoint is kept: make room, then go on with "
            f"expire-span resume={folder}"
        ) from None


# Who writes

@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run folder against other processes; the system frees it when this one ends, however it ends."""
    if fcntl is None:
        yield
        return
    with open(Path(folder) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run folder {folder} is in use by process {file.read().strip() or 'unknown'}; "
                "wait for it, or choose another with hydra.run.dir=..."
            ) from None
        except OSError:
            pass  # a file system without locks, as on some clusters: unguarded, but not refused
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
