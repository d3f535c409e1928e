"""Wait for what another process writes."""

import time
from pathlib import Path


def wait_for_lines(path: Path, lines: int) -> None:
    deadline = time.time() + 60
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.time() < deadline, f"{path} has not {lines} lines after a minute"
        time.sleep(0.05)
