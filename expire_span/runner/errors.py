"""Report user errors: the one line that a command prints before it exits."""

import difflib
import os
import re
import sys
from typing import NoReturn

import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as the user has set it
USER_ERRORS = (ValueError, OSError, MemoryError, HydraException, OmegaConfBaseException)


def root_cause(error: Exception) -> Exception:
    """The error of the constructor, where Hydra has wrapped it; `OutOfMemory` for every way to run out of memory."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return OutOfMemory(error) if is_out_of_memory(error) else error


class OutOfMemory(MemoryError):
    """An error of an allocation, with what to do about it, and what is saved."""

    def __init__(self, error: Exception, saved: str = ""):
        reason = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        text = reason[0] if reason else one_line(error)[:100]
        super().__init__(
            f"out of memory ({text}); lower train.batch_size, train.block_size or memory.max_span in a new run, or set "
            f"transformer.activation_checkpointing=true or a smaller eval.batch_size{saved and f'; {saved}'}"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy, a CPU or a GPU had no memory left; false for an `OutOfMemory` that says so already."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    return isinstance(error, MemoryError | torch.OutOfMemoryError) and not isinstance(error, OutOfMemory)


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
    if missing := re.search(
        r"Could not find '([\w/]+)/([^/']+)' Available options in '.*?': (.*?) Config search", message
    ):
        group, option, options = missing.groups()
        close = difflib.get_close_matches(option, options.split(), n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(options.split())}"
        message = f"{group}={option} does not exist; {advice}"
    if message.startswith("Could not override"):
        message = message.split(". ")[0] + ": there is no such key; `expire-span --cfg job` prints those there are"
        message += ", ++key=value sets one of another task or optimizer, as in a sweep"
    sys.exit(f"error: {message}")
