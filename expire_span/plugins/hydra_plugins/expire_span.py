"""Hydra launchers for sweeps. Each job is a process of its own, so that one that is killed does not end the others.

Hydra finds launchers in the namespace package `hydra_plugins` only: the command puts this one's folder on `sys.path`.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from expire_span.runner.config.overrides import quote
from expire_span.runner.errors import SHOW_TRACEBACK
from expire_span.runner.stop_signals import Stopped, heeded_signals

log = logging.getLogger(__name__)
POLL_SECONDS = 0.05


class Job(NamedTuple):
    """One job of a sweep: its number, its run folder, and the arguments of the `expire-span` that runs it alone."""

    number: int
    folder: str
    arguments: list[str]


class SweepLauncher(Launcher):
    """Runs the jobs of a sweep, and says at the end which of them did not finish, and how to go on with those."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.config_loader, self.config = hydra_context.config_loader, config

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> list[int | None]:
        """The exit code of each job; negative: the signal that killed it; None: it was not started."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs. Raises ValueError if one of them did not finish."""
        setup_globals()  # Hydra's resolvers, which the folders' names need
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = [self.job(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        log.info(f"sweep of {len(jobs)} jobs in {self.config.hydra.sweep.dir}")
        unfinished = [job.folder for job, code in zip(jobs, self.run(jobs), strict=True) if code != 0]
        if unfinished:
            raise ValueError(
                f"{len(unfinished)} of {len(jobs)} jobs did not finish: {', '.join(unfinished)}. "
                f"The same command goes on with them: {self.command()}"
            )
        return [JobReturn(status=JobStatus.COMPLETED)] * len(jobs)

    def job(self, number: int, overrides: Sequence[str]) -> Job:
        """The job with these overrides, in the folder that Hydra's config names for it."""
        config = self.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)  # which the folder's name may refer to
        folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        HydraConfig.instance().set_config(self.config)
        sources = self.config.hydra.runtime.config_sources
        flags = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
        flags.append(f"--config-name={self.config.hydra.job.config_name}")
        of_hydra = map(str, OmegaConf.to_container(self.config.hydra.overrides.hydra) or [])  # as they were written
        flags += [override for override in of_hydra if not override.startswith("hydra.mode=")]
        own = [f"hydra.job.num={number}", f"hydra.run.dir={quote(str(folder))}"]
        return Job(number, folder, [*flags, *overrides, *own])

    def command(self) -> str:
        """The command that continues this sweep."""
        arguments = sys.argv[1:]
        if not any(argument.startswith("hydra.sweep.dir=") for argument in arguments):
            arguments = [*arguments, f"hydra.sweep.dir={quote(str(self.config.hydra.sweep.dir))}"]
        return shlex.join(["expire-span", *arguments])


class ProcessLauncher(SweepLauncher):
    """Runs jobs on this machine, `n_jobs` at the same time. Ctrl-C stops and saves those that run."""

    def __init__(self, n_jobs: int) -> None:
        if not isinstance(n_jobs, int) or n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs must be a whole number of at least 1, got {n_jobs}")
        self.n_jobs = n_jobs

    def run(self, jobs: Sequence[Job]) -> list[int | None]:
        """Raises `Stopped` after a Ctrl-C, SIGTERM or SIGHUP, when the jobs that ran have saved and ended."""
        codes: list[int | None] = [None] * len(jobs)
        waiting, running = list(range(len(jobs))), dict[int, subprocess.Popen[bytes]]()
        stopped = 0  # by the signal of this number
        with received_signals() as signals:
            while running or (waiting and not stopped):
                while waiting and len(running) < self.n_jobs and not stopped:
                    index = waiting.pop(0)
                    log.info(f"job {jobs[index].number}: {jobs[index].folder}")
                    running[index] = start(jobs[index])
                time.sleep(POLL_SECONDS)
                while signals:  # a second one makes the jobs end without saving
                    stopped = signals.pop()
                    for process in running.values():
                        process.send_signal(signal.SIGTERM)
                for index in [index for index, process in running.items() if process.poll() is not None]:
                    codes[index] = code = running.pop(index).returncode
                    if code < 0 and not stopped:
                        log.error(f"job {jobs[index].number} was killed ({signal.Signals(-code).name})")
        if stopped:
            done = f"{codes.count(0)} of {len(jobs)} jobs finished"
            raise Stopped(stopped, f"sweep stopped, {done}; to go on: {self.command()}")
        return codes


def start(job: Job) -> "subprocess.Popen[bytes]":
    """Start a job. In a process group of its own it gets no Ctrl-C from the terminal, so that it gets only one."""
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR" or SHOW_TRACEBACK}
    command = [sys.executable, "-P", "-m", "expire_span", *job.arguments]  # -P: nothing of the current folder instead
    return subprocess.Popen(command, env=environment, process_group=0)


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list of the signals to stop that have arrived, in the place of their effect."""
    numbers: list[int] = []
    previous_handlers = {
        number: signal.signal(number, lambda number, frame: numbers.append(number)) for number in heeded_signals()
    }
    try:
        yield numbers
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
