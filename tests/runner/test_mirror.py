"""W&B mirrors a run, and is never needed by it."""

import sys

from tiny import tiny

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
