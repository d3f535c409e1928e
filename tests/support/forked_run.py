"""A training in a forked process, which can be killed at any moment, and what it must leave behind."""

import builtins
import io
import json
import os
import resource
import signal
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.stop_signals import NUMBERS, Stopped, stop_signals
from expire_span.runner.train import train

DIED = 77  # exit code of a death at a file operation
TRACEBACK = 99
CONFIG_FILES = {".hydra/config.yaml": "text: of a config\n", ".hydra/overrides.yaml": "[]\n"}


class Ended(NamedTuple):
    """How a process ended."""

    code: int  # its exit code, or minus the number of the signal that killed it
    message: str
    seconds: float


def forked_run(config, folder, kill=None, delay=0.0, die_at=None, max_file_size=None):
    """Train in a child process, and return how it ended.

    Args:
        kill, delay: a signal for the child, and the seconds after which it is sent.
        die_at: the number of the file operation at which the child ends at once, without any cleaning up.
        max_file_size: bytes beyond which no file can grow, as on a full disk.
    """
    folder.mkdir(exist_ok=True)
    output = folder.with_name(folder.name + "-output")
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # until the child has its handlers
    start, child = time.perf_counter(), os.fork()
    if child == 0:
        run_child(config, folder, output, die_at, max_file_size)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
    if kill is not None:
        time.sleep(delay)
        os.kill(child, kill)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    message = output.read_text() if output.exists() else ""
    output.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), message, seconds)


def run_child(config, folder, output, die_at, max_file_size):
    """Everything that the child does. It never returns."""
    code, message, counter = TRACEBACK, "", FileOperations(die_at)
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        if max_file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, resource.RLIM_INFINITY))
        with stop_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)
            try:
                counter.start()
                train(config, folder, command=["expire-span"], config_files=CONFIG_FILES)
                code = 0
            except Stopped as stop:
                code, message = stop.code, stop.message
            except (ValueError, OSError) as error:
                code, message = 1, str(error)
            except BaseException:
                message = traceback.format_exc()
        if max_file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        counter.stop()
        output.write_text(message)
    finally:
        os._exit(code)


class FileOperations:
    """Counts what changes files, and ends the process before one of these operations."""

    def __init__(self, die_at):
        self.die_at, self.count, self.originals = die_at, 0, {}

    def start(self):
        for name in ("fsync", "replace", "unlink", "mkdir"):
            self.replace(os, name)
        for module in (builtins, io):
            self.replace(module, "open", lambda *arguments, **options: is_for_writing(*arguments, **options))

    def replace(self, module, name, is_counted=lambda *arguments, **options: True):
        original = self.originals[module, name] = getattr(module, name)

        def operation(*arguments, **options):
            if is_counted(*arguments, **options):
                if self.count == self.die_at:
                    os._exit(DIED)
                self.count += 1
            return original(*arguments, **options)

        setattr(module, name, operation)

    def stop(self):
        for (module, name), original in self.originals.items():
            setattr(module, name, original)


def is_for_writing(file, mode="r", *arguments, **options):
    return not isinstance(file, int) and file != os.devnull and not set(mode).isdisjoint("wax+")


def result(folder: Path):
    """All that a finished run leaves behind, but for times, memory, and the random names of its W&B run and saves."""
    content = checkpoint.load(folder)
    streams = [{name: value for name, value in part.items() if name != "save_id"} for part in content["streams"]]
    content = {name: value for name, value in content.items() if name not in ("run_id", "metrics", "save_id")}
    rows = [without_costs(row) for row in read_metrics(folder / "metrics.jsonl")]
    summary = json.loads((folder / "summary.json").read_text())
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "best")}
    return {
        "rows": [repr(row) for row in rows],  # with NaN equal to NaN
        "summary": repr(without_costs(summary["metrics"])),
        "checkpoint": content | {"streams": streams},
        "weights": tensors,
    }


def without_costs(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def differences(expected, actual, path=""):
    """Where two results differ, in any bit."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        same = expected.dtype == actual.dtype and torch.equal(expected, actual)
        return [] if same else [path]
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        return [place for key in expected for place in differences(expected[key], actual[key], f"{path}.{key}")]
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return [place for index, pair in pairs for place in differences(*pair, f"{path}.{index}")]
    return [] if repr(expected) == repr(actual) else [path]  # with NaN equal to NaN
