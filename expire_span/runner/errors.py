"""Report user errors: the one line that a command prints before it exits."""

import difflib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .ranks import is_reporter

SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # as the user has set it
USER_ERRORS = (ValueError, OSError, MemoryError, HydraException, OmegaConfBaseException)


def root_cause(error: Exception) -> Exception:
    """The error of the constructor, where Hydra has wrapped it; `OutOfMemory` for every way to run out of memory."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, RecursionError):
        return ValueError("the config is nested too deeply, or refers to itself").with_traceback(error.__traceback__)
    return OutOfMemory(error) if is_out_of_memory(error) else error


class OutOfMemory(MemoryError):
    """An error of an allocation, with what to do about it, and what is saved."""

    def __init__(self, error: Exception, saved: str = ""):
        reason = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        text = reason[0] if reason else one_line(error)[:100]
        super().__init__(
            f"out of memory ({text}); set a smaller train.micro_batch_size, train.offload_memory=true or "
            "transformer.activation_checkpointing=true, which change no result, or lower train.batch_size, "
            "train.block_size, memory.max_span or the sizes of transformer in a new run" + (saved and f"; {saved}")
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
    is_user_error = isinstance(error, USER_ERRORS)
    if not is_reporter(described(error)) and is_user_error and not SHOW_TRACEBACK:
        sys.exit(1)
    if SHOW_TRACEBACK or not is_user_error:
        raise error
    if isinstance(error, BrokenPipeError):  # the reader, such as head, has closed the pipe
        os._exit(1)
    sys.exit(f"error: {described(error)}")


def described(error: Exception) -> str:
    """An error in one line that is not too long: a user's explained, an unexpected one with the name of its class."""
    is_user_error = isinstance(error, USER_ERRORS)
    return shortened(explained(error) if is_user_error else f"{type(error).__name__}: {one_line(error)}")


def explained(error: Exception) -> str:
    """The message of an error, in one line; Hydra's long ones in our words, with what may have been meant."""
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    message = one_line(error).partition(" full_key: ")[0]  # which OmegaConf adds for programmers
    if missing := re.search(
        r"Could not find '([\w/]+)/([^/']+)' Available options in '.*?': (.*?) Config search", message
    ):
        group, option, options = missing.groups()
        close = difflib.get_close_matches(option, options.split(), n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(options.split())}"
        return f"{group}={option} does not exist; {advice}"
    if unknown := re.match(r"Could not override '(.*?)'\.", message):
        key = unknown[1]
        inner = re.match(r"Key '(.*?)' is not in struct", str(error.__cause__))
        if inner and inner[1] not in key.split("."):  # KEY={INNER: VALUE}
            key = f"{key}.{inner[1]}"
        if close := similar_keys(key, error):
            return f"there is no key {key}; did you mean {' or '.join(close)}?"
        return (
            f"there is no key {key}; `expire-span --cfg job` prints those there are, and ++KEY=VALUE sets one "
            "of another task or optimizer, as in a sweep"
        )
    if null := re.match(r"Could not delete from config\. '(.*)' does not exist", message):
        return f"~{null[1]} removes nothing: the key is null, or there is none; {null[1]}=null is how to set it to null"
    if unreadable := re.match(r"Error parsing override '(.*)' missing EQUAL", message):
        return f"{unreadable[1]} is neither KEY=VALUE nor a flag; see expire-span --help"
    return message


def shortened(message: str) -> str:
    """A message without its middle where that is long, such as a value of thousands of characters."""
    return message if len(message) <= 1000 else f"{message[:700]} [...] {message[-250:]}"


def similar_keys(key: str, error: Exception) -> list[str]:
    """Keys of the config like one that it does not have: of the same section, if there is one, else of all.

    Args:
        error: as Hydra raises it; its cause knows the config.
    """
    node = getattr(error.__cause__, "parent_node", None)
    keys = list(dotted_keys(OmegaConf.to_container(node._get_root()))) if node is not None else []
    section, _, name = key.rpartition(".")
    names = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == section]
    if section and names:
        return [f"{section}.{close}" for close in difflib.get_close_matches(name, names)]
    return difflib.get_close_matches(key, keys)


def dotted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a nested dictionary, and of all dictionaries in it."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from dotted_keys(value, f"{prefix}{key}.")
