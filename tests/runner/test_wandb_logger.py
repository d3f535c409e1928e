"""W&B mirrors a run, and no run depends on it."""

import subprocess
import sys

from tiny_config import COPY, tiny_config

from expire_span.runner.train import train


def test_an_offline_run_is_kept_for_a_later_sync_under_its_own_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    train(tiny_config("wandb.mode=offline", "wandb.group=together", "wandb.tags=[a,b]"), folder)
    [path] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = path.read_bytes()
    for text in (b"together", b"train/accuracy", b"memory/size_layer_1", b"expire_span.tasks.copy.Copy"):
        assert text in content


def test_the_variable_wandb_mode_decides_where_the_config_says_auto(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tiny_config("wandb.mode=auto"), tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_a_run_of_a_sweep_that_is_resumed_stays_in_the_group_of_the_sweep(tmp_path):
    start = [sys.executable, "-m", "expire_span"]
    sweep_folder = [f"hydra.sweep.dir={tmp_path}/together", "hydra.sweep.subdir=one"]
    sweep = [*start, "-m", *COPY, "train.updates=2", "wandb.mode=offline", *sweep_folder]
    resume = [*start, f"resume={tmp_path}/together/one", "train.updates=3"]
    for number, command in enumerate((sweep, resume), start=1):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        paths = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(paths) == number
        assert all(b"together" in path.read_bytes() for path in paths)


def test_a_run_without_the_package_continues_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = train(tiny_config("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in metrics
    assert "W&B is off for this run" in caplog.text


def test_a_run_whose_wandb_fails_in_the_middle_continues(tmp_path, monkeypatch, caplog):
    import wandb

    class FailingRun:
        def log(self, *arguments, **keywords):
            raise OSError("no space left")

        def finish(self, **keywords):
            raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", lambda **keywords: FailingRun())
    metrics = train(tiny_config("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in metrics
    assert caplog.text.count("W&B stopped") == 1
