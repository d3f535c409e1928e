"""A command of the project in a process that is forked from one with everything imported: a start costs 0.1 s."""

import importlib
import multiprocessing
import os
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

COMMANDS = {
    "expire-span": "expire_span.runner.cli",
    "expire-span-generate": "expire_span.runner.commands.generate",
    "expire-span-paper": "expire_span.runner.commands.paper",
    "expire-span-plan": "expire_span.runner.commands.plan",
    "expire-span-play": "expire_span.runner.commands.play",
    "expire-span-report": "expire_span.runner.commands.report",
}
MEMORY = 4 * 2**30  # bytes that a command may take beyond what the imports have taken

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*COMMANDS.values(), "expire_span.tasks.copy", "torch._dynamo"])


class Ended(NamedTuple):
    """How a command ended."""

    code: int | None  # its exit code, minus the number of the signal that killed it, or None: it went on for too long
    stdout: str
    stderr: str
    seconds: float


def forked_command(command, folder: Path, seconds=60.0, environment=(), during=None):
    """Run a command, given as on a command line, in a folder.

    Args:
        during: called with the number of the process once it has started.
    """
    paths = [folder.with_name(f"{folder.name}-{stream}") for stream in ("stdout", "stderr")]
    process = context.Process(target=run_here, args=(command, folder, paths, dict(environment)))
    start = time.perf_counter()
    process.start()
    try:
        if during is not None:
            during(process.pid)
        process.join(seconds)
        code = process.exitcode
    finally:
        process.kill()
        process.join()
    texts = [path.read_text(errors="replace") for path in paths]
    for path in paths:
        path.unlink()
    return Ended(code, *texts, time.perf_counter() - start)


def assert_runs_or_ends_with_one_line(ended, what):
    """Nothing else may happen to a command, whatever it is given. Returns which of them did."""
    message = f"{what}: code {ended.code} after {ended.seconds:.0f} s\n{ended.stderr[-3000:]}"
    assert ended.code is not None, f"a hang: {message}"
    assert "Traceback" not in ended.stderr + ended.stdout, message
    assert "usage:" not in ended.stderr, message
    if ended.code == 0:
        return "ran"
    assert ended.code > 0, message
    assert len(ended.stderr.splitlines()) == 1, message
    assert len(ended.stderr) < 1000, message
    return "one line"


def run_here(command, folder, paths, environment):
    """What the forked process does."""
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **environment}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
    sys.argv = list(command)
    importlib.import_module(COMMANDS[command[0]]).main()
