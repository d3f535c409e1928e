"""W&B mirrors a run, and is never needed by it."""

import subprocess
import sys

from tiny import SHRUNK, TASKS, tiny

from expire_span.runner.loop import train


def test_an_offline_run_is_kept_for_a_later_sync_under_its_own_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    train(tiny("wandb.mode=offline", "wandb.group=together", "wandb.tags=[a,b]"), folder)
    [kept] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for each in (b"together", b"train/accuracy", b"memory/size_layer_1", b"expire_span.tasks.copy.Copy"):
        assert each in content


def test_wandb_s_own_word_on_its_mode_is_heeded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tiny("wandb.mode=auto"), tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_a_sweep_s_run_that_is_resumed_stays_in_the_sweep_s_group(tmp_path):
    sizes = [*SHRUNK, *TASKS["copy"], "memory.max_span=32", "train.updates=2", "wandb.mode=offline"]
    start = [sys.executable, "-m", "expire_span"]
    swept = [*start, "-m", *sizes, f"hydra.sweep.dir={tmp_path}/together", "hydra.sweep.subdir=one"]
    resumed = [*start, f"resume={tmp_path}/together/one", "train.updates=3"]
    for number, command in enumerate((swept, resumed), start=1):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        kept = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(kept) == number
        assert all(b"together" in path.read_bytes() for path in kept)


def test_a_run_without_the_package_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    figures = train(tiny("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in figures
    assert "W&B is off for this run" in caplog.text


def test_a_run_whose_wandb_fails_in_the_middle_goes_on(tmp_path, monkeypatch, caplog):
    import wandb

    class Failing:
        def log(self, *arguments, **named):
            raise OSError("no space left")

        def finish(self, **named):
            raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", lambda **named: Failing())
    figures = train(tiny("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in figures
    assert caplog.text.count("W&B stopped") == 1
