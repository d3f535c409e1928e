"""Where a run came from: command line, commit, uncommitted changes and versions."""

import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .files import write_atomically

CHECKOUT = Path(__file__).resolve().parents[3]
PACKAGES = ("numpy", "hydra-core", "expire-span", "triton", "gymnasium")
DIFF_LIMIT = 5 * 2**20  # bytes


def provenance(argv: Sequence[str] | None = None, checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Command line, commit, versions and start time (UTC) of this process.

    Where the package does not run from a checkout, commit and dirty are None.
    """
    commit = _commit(checkout)
    return {
        "command": command_line(sys.argv if argv is None else argv),
        "commit": commit,
        "dirty": bool(_git(checkout, "status", "--porcelain", "--", ".")) if commit else None,
        "versions": versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it into a shell, without the folder of the program."""
    program = Path(argv[0])
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    result = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            result[package] = version(package)
    result["torch"] = str(torch.__version__)  # with its local tag, which says which build it is
    if torch.version.cuda:
        result["cuda"] = torch.version.cuda
    return result


def write_diff(folder: Path, checkout: Path = CHECKOUT) -> Path | None:
    """Write diff.patch, to be applied to the commit by `git apply`, headed by the names of untracked files.

    Returns None, and leaves no file, if the checkout is clean.
    """
    path = Path(folder) / "diff.patch"
    diff = untracked = b""
    if _commit(checkout):
        diff = _git(checkout, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--", ".") or b""
        untracked = _git(checkout, "ls-files", "--others", "--exclude-standard") or b""
    if not diff and not untracked:
        path.unlink(missing_ok=True)  # an earlier start's diff would contradict the summary's commit
        return None
    header = b"".join(b"# untracked: %s\n" % name for name in untracked.splitlines())
    if len(diff) > DIFF_LIMIT:
        header += b"# truncated: the first %d of %d bytes, too few to apply\n" % (DIFF_LIMIT, len(diff))
    write_atomically(path, header[:DIFF_LIMIT] + diff[:DIFF_LIMIT])
    return path


def _commit(checkout: Path) -> str | None:
    """The commit, if this is a checkout of this project: an installed copy may lie in someone else's repository."""
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    except (OSError, ValueError, KeyError):
        return None
    if project != "expire-span" or not _git(checkout, "ls-files", "pyproject.toml"):
        return None
    commit = _git(checkout, "rev-parse", "--verify", "--quiet", "HEAD")
    return commit.decode().strip() if commit else None


def _git(checkout: Path, *arguments: str) -> bytes | None:
    """The output of a git command, or None if git is missing or the command fails."""
    hook_variables = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}  # name the repository of a git hook
    environment = {name: value for name, value in os.environ.items() if name not in hook_variables}
    command = ["git", "-C", str(checkout), *arguments]
    try:
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
