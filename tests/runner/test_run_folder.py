"""The files of a run folder survive full disks, crashes and two processes at once."""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.logging.run_log import RunLog
from expire_span.runner.run_folder import files
from expire_span.runner.train import train

METRICS = "metrics.jsonl"


def test_a_summary_is_strict_json_with_null_for_nan_and_infinity(tmp_path):
    metrics = {"test/bpb": math.nan, "test/accuracy": 1 / 3, "spans": (1.0, math.inf)}
    files.write_summary(tmp_path, {"metrics": metrics, "finished": True})
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written == {
        "metrics": {"test/bpb": None, "test/accuracy": 1 / 3, "spans": [1.0, None]},
        "finished": True,
    }


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    files.write_summary(tmp_path, {"finished": False})
    with pytest.raises(TypeError):
        files.write_summary(tmp_path, {"finished": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"finished": False}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_full_disk_leaves_the_old_summary(tmp_path, full_disk):
    files.write_summary(tmp_path, {"finished": False})
    with full_disk(100), pytest.raises(OSError, match="summary.json could not be written"):
        files.write_summary(tmp_path, {"finished": True, "text": "long" * 100})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"finished": False}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_metrics_are_read_as_they_were_logged(tmp_path):
    rows = [{"update": 1, "train/loss": 1 / 3}, {"update": 2, "train/loss": 1e-300}]
    for row in rows:
        files.append_metrics(tmp_path / METRICS, row)
    assert files.read_metrics(tmp_path / METRICS) == rows


def test_an_infinite_metric_is_null_in_the_file_and_nan_when_read(tmp_path):
    files.append_metrics(tmp_path / METRICS, {"update": 1, "train/loss": math.inf})
    assert (tmp_path / METRICS).read_text() == '{"update": 1, "train/loss": null}\n'
    assert math.isnan(files.read_metrics(tmp_path / METRICS)[0]["train/loss"])


@pytest.mark.parametrize("value", ["0.3", True, None, torch.tensor(0.3)], ids=["text", "bool", "none", "tensor"])
def test_a_metric_of_another_type_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="train/loss"):
        files.append_metrics(tmp_path / METRICS, {"update": 1, "train/loss": value})
    assert not (tmp_path / METRICS).exists()


def test_numpy_numbers_are_numbers(tmp_path):
    row = {"update": torch.tensor(3).numpy()[()], "train/loss": torch.tensor(0.5).numpy()[()]}
    files.append_metrics(tmp_path / METRICS, row)
    assert files.read_metrics(tmp_path / METRICS) == [{"update": 3, "train/loss": 0.5}]


def test_truncation_keeps_the_update_to_resume_from_and_removes_later_ones(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upda')
    assert [row["update"] for row in files.read_metrics(path)] == [1, 2, 3]
    files.truncate_metrics(path, 2, last_update=9)
    files.append_metrics(path, {"update": 3})
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n{"update": 3}\n'


def test_a_complete_last_line_without_a_line_break_is_kept(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"update": 1}\n{"update": 2}')
    files.truncate_metrics(path, 2, last_update=9)
    files.append_metrics(path, {"update": 3})
    assert [row["update"] for row in files.read_metrics(path)] == [1, 2, 3]


def test_a_run_that_logged_nothing_can_be_truncated(tmp_path):
    files.truncate_metrics(tmp_path / METRICS, 5, last_update=9)
    assert not (tmp_path / METRICS).exists()


def test_a_broken_line_in_the_middle_is_reported_and_not_skipped(tmp_path):
    (tmp_path / METRICS).write_text('{"update": 1}\n{"upda\n{"update": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        files.read_metrics(tmp_path / METRICS)


NO_ROWS = {
    "null": b"null",
    "a number": b"5",
    "a text": b'"text"',
    "a list": b"[1, [2]]",
    "another dictionary": b'{"a": {"b": 1}}',
    "a text for a number": b'{"update": 1, "train/loss": "0.5"}',
    "no update": b'{"train/loss": 0.5}',
    "an update that is missing": b'{"update": null}',
    "binary": b"\xff\xfe\n{}",
    "nested": b"[" * 100_000 + b"\n{}",
}


@pytest.mark.parametrize("content", NO_ROWS.values(), ids=NO_ROWS)
def test_json_that_is_no_row_of_metrics_is_refused_with_its_line(content, tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(b'{"update": 1}\n' + content)
    for read in (files.read_metrics, lambda path: files.truncate_metrics(path, 1, last_update=9)):
        with pytest.raises(ValueError, match=f"^{path}: line 2 is no row of metrics"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"null", b"5", b'"text"', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000])
def test_a_damaged_summary_or_vocab_is_refused_with_its_path(content, tmp_path):
    for name in ("summary.json", "vocab.json"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/summary.json is damaged"):
        files.read_summary(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/vocab.json is damaged"):
        files.check_same_vocab(tmp_path, SimpleNamespace(vocab="abc"))


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    program = (
        "import sys; from expire_span.runner.run_folder.files import lock\n"
        "with lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_the_process_and_what_to_do(tmp_path, holder):
    with (
        pytest.raises(ValueError, match=rf"in use by process {holder.pid}; .*hydra\.run\.dir") as refusal,
        files.lock(tmp_path),
    ):
        pass
    assert "\n" not in str(refusal.value)


def test_a_killed_process_releases_its_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with files.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with files.lock(tmp_path):
        pass


def test_a_start_that_writes_nothing_leaves_no_lock_and_another_one_does(tmp_path):
    with files.lock(tmp_path):
        pass
    assert not os.listdir(tmp_path)
    with files.lock(tmp_path):
        files.write_summary(tmp_path, {})
    assert sorted(os.listdir(tmp_path)) == [".lock", "summary.json"]


def test_two_starts_never_hold_a_folder_at_once_though_its_lock_is_removed_again_and_again(tmp_path):
    folder, held = tmp_path / "run", threading.Lock()

    def start_often(_):
        times = 0
        while times < 200:
            with suppress(ValueError), files.lock(folder):  # ValueError: in use
                assert held.acquire(blocking=False)
                times += 1
                time.sleep(0)
                held.release()
            with suppress(OSError):
                folder.rmdir()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(start_often, range(3)))
    assert not folder.exists()


def test_a_full_disk_is_reported_with_the_file(tmp_path):
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match=r"^/dev/full could not be written \(No space left on device\)$"):
        files.append_metrics(path, {"update": 1})


# Links in a run folder of somebody else


@pytest.mark.parametrize("name", [".lock", ".hydra", "metrics.jsonl", "run.log", "tensorboard"])
def test_a_link_in_a_run_folder_is_refused_and_what_it_points_to_stays(name, tmp_path):
    target, folder = tmp_path / "target", tmp_path / "run"
    folder.mkdir()
    target.write_text("mine")
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match=f"run/{name} is a link"), files.lock(folder):
        pass
    assert target.read_text() == "mine"


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("name", [".lock", "summary.json.part", "summary.json", "metrics.jsonl", "run.log"])
def test_what_a_link_in_a_run_folder_points_to_is_never_overwritten(name, link, tmp_path):
    target, folder = tmp_path / "target", tmp_path / "run"
    folder.mkdir()
    target.write_text('{"update": 1}\n')
    link(folder / name, target)
    with suppress(ValueError, OSError), files.lock(folder):
        files.write_summary(folder, {"finished": True})
        files.truncate_metrics(folder / METRICS, 1, last_update=9)
        files.append_metrics(folder / METRICS, {"update": 2})
    with suppress(OSError):
        files.append_metrics(folder / METRICS, {"update": 2})
    if link is Path.symlink_to:
        write_to_run_log(folder)
    assert target.read_text() == '{"update": 1}\n'


def write_to_run_log(folder):
    handler = RunLog(folder / "run.log")
    handler.emit(logging.LogRecord("name", logging.INFO, "path", 1, "a message", (), None))
    handler.close()


def test_run_log_begins_with_the_first_message_and_its_failures_stop_nothing(tmp_path, full_disk):
    handler = RunLog(tmp_path / "run.log")
    assert not (tmp_path / "run.log").exists()
    handler.close()
    with full_disk(0):
        write_to_run_log(tmp_path)
    write_to_run_log(tmp_path / "missing")
    write_to_run_log(tmp_path)
    assert (tmp_path / "run.log").read_text() == "a message\n"


def test_a_full_disk_promises_a_checkpoint_only_if_there_is_one(folder, full_disk):
    with full_disk(100), pytest.raises(OSError, match="nothing is saved yet: run the same command again") as end:
        train(tiny_config(), folder, config_files={".hydra/config.yaml": "x" * 1000})
    assert f"{folder}/.hydra/config.yaml could not be written" in str(end.value)
    train(tiny_config(), folder)
    with full_disk(100), pytest.raises(OSError, match=f"update 4 is saved; to resume: expire-span resume={folder}$"):
        train(tiny_config(), folder, config_files={".hydra/config.yaml": "x" * 1000})
