"""Pre-emption as on a Slurm cluster, by submitit's executor for this machine."""

import os
import signal
from pathlib import Path

import pytest
from tiny_config import COPY, tiny_config
from wait import wait_for_lines

from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train

submitit = pytest.importorskip("submitit")
SUPPORT = Path(__file__).parents[1] / "support"


def losses(folder):
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


def test_a_preempted_job_saves_and_is_requeued_and_goes_on_to_the_same_losses(tmp_path, monkeypatch):
    from preempted_job import TrainingJob

    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
    folder, overrides = tmp_path / "run", ["train.updates=30", "run.log_every=1", "run.checkpoint_every=1000"]
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(TrainingJob(), *COPY, *overrides, f"hydra.run.dir={folder}")
    wait_for_lines(folder / "metrics.jsonl", lines=3)
    os.kill(int((folder / ".lock").read_text()), signal.SIGUSR2)
    job.wait()
    assert f"resuming in {folder}" in job.stdout()
    (tmp_path / "uninterrupted").mkdir()
    train(tiny_config(*overrides), tmp_path / "uninterrupted")
    assert losses(folder) == losses(tmp_path / "uninterrupted")
