"""Files that a command writes to where its user says."""

from pathlib import Path


def output_path(text: str) -> Path:
    """A path of the command line. In `--html=~/page.html` a shell leaves the ~ as it is."""
    return Path(text).expanduser()


def write_output(path: Path, text: str) -> None:
    """Write a text to a file, whose folders are made if need be, or to a device such as /dev/stdout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
