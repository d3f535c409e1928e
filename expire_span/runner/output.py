"""Standard output and error that do not end a run when nobody reads them any more, or when their disk is full."""

import logging
import os
import sys
from typing import Any

log = logging.getLogger(__name__)


def keep_running_without_output() -> None:
    """Let a failed write to stdout or stderr be told once in run.log, instead of ending the run or each line of it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        setattr(sys, name, OutputStream(getattr(sys, name), name))


class OutputStream:
    """A text stream that goes to os.devnull from its first failed write on."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As of a file; never raises OSError."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.discard(error)
            return len(text)

    def flush(self) -> None:
        """As of a file; never raises OSError."""
        try:
            self.stream.flush()
        except OSError as error:
            self.discard(error)

    def discard(self, error: OSError) -> None:
        """Send what follows, and what is still in the buffer, to nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        log.warning(f"{self.name} cannot be written any more ({error.strerror}); run.log goes on")
