"""A text to train on, an empty run folder, and a full disk."""

import resource
import signal
from contextlib import contextmanager

import pytest


@pytest.fixture(autouse=True, scope="session")
def signals_are_heeded():
    """Where the tests run under nohup or in the background, they and their processes would ignore some signals."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, {number} bottles. " for number in range(300)))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def full_disk():
    """A context in which no file can grow beyond a number of bytes: that fails in the same way as a full disk."""

    @contextmanager
    def limit_file_size(size):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    return limit_file_size
