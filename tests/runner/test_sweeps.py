"""Sweeps: what becomes of the other jobs when one is killed, and how an interrupted sweep goes on."""

import os
import signal
import subprocess
import sys

import pytest
from tiny_config import COPY
from wait import wait_for_lines

from expire_span.results import load_runs
from expire_span.runner.run_folder import checkpoint


def sweep_command(folder, *overrides):
    paths = [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=seed${seed}"]
    return [sys.executable, "-m", "expire_span", "-m", *COPY, "run.log_every=1", *paths, *overrides]


def start(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_job_does_not_end_the_others_and_the_same_command_goes_on_with_it(tmp_path):
    command = sweep_command(tmp_path, "seed=1,2", "train.updates=60", "hydra.launcher.n_jobs=2")
    with start(command) as sweep:
        wait_for_lines(tmp_path / "seed1/metrics.jsonl", lines=4)
        os.kill(int((tmp_path / "seed1/.lock").read_text()), signal.SIGKILL)
        output, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 1
    assert "job 0 was killed (SIGKILL)" in output
    assert f"1 of 2 jobs did not finish: {tmp_path}/seed1. The same command goes on with them: " in errors
    assert [path.parent.name for path in tmp_path.glob("*/summary.json")] == ["seed2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert f"resuming in {tmp_path}/seed1" in result.stdout
    assert load_runs(tmp_path).finished.tolist() == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_saves_the_job_that_runs_and_starts_no_other(number, tmp_path):
    with start(sweep_command(tmp_path, "seed=1,2", "train.updates=100000", "run.checkpoint_every=100000")) as sweep:
        wait_for_lines(tmp_path / "seed1/metrics.jsonl", lines=2)
        sweep.send_signal(number)
        _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 128 + number
    *_, stopped, how_to_go_on = errors.splitlines()
    assert stopped.startswith("stopped; update")
    assert how_to_go_on.startswith("sweep stopped, 0 of 2 jobs finished; to go on: expire-span -m")
    assert checkpoint.load(tmp_path / "seed1")["update"] > 0
    assert not (tmp_path / "seed2").exists()
