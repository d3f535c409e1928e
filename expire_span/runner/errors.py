"""Report user errors: the one line that a command prints before it exits."""

import os
import sys
from typing import NoReturn

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as the user has set it
USER_ERRORS = (ValueError, OSError, HydraException, OmegaConfBaseException)


def root_cause(error: Exception) -> Exception:
    """The error of the constructor, where Hydra has wrapped it into an InstantiationException."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def one_line(error: Exception) -> str:
    """The error's message, without its line breaks."""
    return " ".join(str(error).split())


def exit_with_message(error: Exception) -> NoReturn:
    """Print user errors as one line and exit with code 1; let unexpected exceptions show their traceback."""
    error = root_cause(error)
    if SHOW_TRACEBACK or not isinstance(error, USER_ERRORS):
        raise error
    if isinstance(error, BrokenPipeError):  # the reader, such as head, has closed the pipe
        os._exit(1)
    message = one_line(error)
    if message.startswith("Could not override"):
        message = message.split(". ")[0] + ": there is no such key; `expire-span --cfg job` prints those there are"
        message += ", ++key=value sets one of another task or optimizer, as in a sweep"
    sys.exit(f"error: {message}")
