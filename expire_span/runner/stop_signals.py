"""Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed: they end a command with one line, and the code 128 + n.

A training finishes and saves its update first, see `StopHandler.deferred`.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
REPEAT_SECONDS = 1.0  # sooner, it is the first one again: a wrapper forwards what the terminal has sent already


class Stopped(SystemExit):
    """Ends the process with the code 128 + the number of the signal; `message` says what is saved."""

    def __init__(self, number: int, message: str = "stopped"):
        super().__init__(128 + number)
        self.number, self.message = number, message


class StopHandler:
    """Handles a signal by raising `Stopped`, or once, while deferred, by keeping its `number`."""

    def __init__(self) -> None:
        self.number: int | None = None  # of the first signal
        self.received = 0.0  # when it came
        self.is_deferred = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.number is not None and time.monotonic() < self.received + REPEAT_SECONDS:
            return
        is_first, self.number = self.number is None, number
        self.received = time.monotonic()
        if not (is_first and self.is_deferred):
            raise Stopped(number)
        with suppress(OSError):  # of a closed terminal; not print, which cannot be called while it is running
            os.write(2, b"stopping once this update is saved; another signal stops at once, and saves nothing\n")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only keep the number of the first signal; at the end raise `Stopped` if that is still to be done."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.number is not None:
            raise Stopped(self.number)


def heeded_signals() -> list[int]:
    """The signals that stop this process: not a SIGHUP that nohup has it ignore."""
    return [n for n in NUMBERS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]


@contextmanager
def stop_signals() -> Iterator[StopHandler]:
    """Install a `StopHandler`, if this is the main thread and there is none yet."""
    installed = signal.getsignal(signal.SIGTERM)
    if isinstance(installed, StopHandler):
        yield installed
        return
    handler = StopHandler()
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    previous_handlers = {number: signal.signal(number, handler) for number in heeded_signals()}
    try:
        yield handler
    finally:
        for number, previous in previous_handlers.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)


def ignore_further_signals() -> None:
    """For a process that is about to end: a second signal could only change its exit code."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)
