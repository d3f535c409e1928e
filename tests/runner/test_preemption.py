"""Pre-emption as on a Slurm cluster, by submitit's executor for this machine."""

import os
import signal
import subprocess
import sys
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


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_preempted_job_saves_and_is_requeued_and_goes_on_to_the_same_losses(num_processes, tmp_path, monkeypatch):
    from preempted_job import TrainingJob

    monkeypatch.setenv("PYTHONPATH", str(SUPPORT), prepend=os.pathsep)
    folder, overrides = tmp_path / "run", ["train.updates=30", "run.log_every=1", "run.checkpoint_every=1000"]
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=5, tasks_per_node=num_processes)
    job = executor.submit(TrainingJob(), *COPY, *overrides, f"hydra.run.dir={folder}")
    wait_for_lines(folder / "metrics.jsonl", lines=3)
    processes = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    assert len(processes) == num_processes
    for process in processes:
        os.kill(int(process), signal.SIGUSR2)
    job.wait()
    assert f"resuming in {folder}" in job.stdout()
    (tmp_path / "uninterrupted").mkdir()
    train(tiny_config(*overrides), tmp_path / "uninterrupted")
    assert losses(folder) == pytest.approx(losses(tmp_path / "uninterrupted"), rel=0 if num_processes == 1 else 1e-4)


@pytest.mark.slow
def test_a_job_with_a_task_for_every_gpu_trains_one_model(tmp_path):
    tasks = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", f"hydra.sweep.dir={tmp_path}/sweep"]
    command = [sys.executable, "-m", "expire_span", "-m", *tasks, *COPY, "hydra.sweep.subdir=job"]
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (tmp_path / "alone").mkdir()
    train(tiny_config(), tmp_path / "alone")
    assert losses(tmp_path / "sweep/job") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
