import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expire_span.runner import record

METRICS = "metrics.jsonl"


def git(folder, *arguments):
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of this project with one commit; code.py has one line."""
    monkeypatch.delenv("GIT_DIR", raising=False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "pyproject.toml").write_text('[project]\nname = "expire-span"\n')
    (folder / "code.py").write_text("old = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


# Provenance

def test_a_clean_checkout_gives_its_commit_and_no_diff(checkout, tmp_path):
    found = record.provenance(checkout=checkout)
    assert found["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert found["dirty"] is False
    assert record.write_diff(tmp_path, checkout) is None
    assert not (tmp_path / "diff.patch").exists()


def test_the_diff_of_a_dirty_checkout_turns_its_commit_into_what_ran(checkout, tmp_path):
    (checkout / "code.py").write_text("new = 2\n")
    (checkout / "forgotten.py").write_text("")
    assert record.provenance(checkout=checkout)["dirty"] is True
    patch = record.write_diff(tmp_path, checkout)
    assert "# untracked: forgotten.py\n" in patch.read_text()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", checkout, clone)
    git(clone, "apply", patch)
    assert (clone / "code.py").read_text() == "new = 2\n"


def test_an_untracked_file_alone_makes_a_checkout_dirty(checkout, tmp_path):
    (checkout / "forgotten.py").write_text("")
    assert record.provenance(checkout=checkout)["dirty"] is True
    assert record.write_diff(tmp_path, checkout).read_text() == "# untracked: forgotten.py\n"


def test_a_diff_is_bounded_and_says_so(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "DIFF_LIMIT", 1000)
    (checkout / "code.py").write_text("x = 1\n" * 10_000)
    text = record.write_diff(tmp_path, checkout).read_text()
    assert text.startswith("# cut: the first 1000 of ")
    assert len(text) < 1100


def test_a_diff_of_an_earlier_start_does_not_outlive_the_clean_tree(checkout, tmp_path):
    (tmp_path / "diff.patch").write_text("of an earlier start")
    record.write_diff(tmp_path, checkout)
    assert not (tmp_path / "diff.patch").exists()


@pytest.mark.parametrize("project", ["someone-elses", None], ids=str)
def test_an_installed_copy_does_not_claim_the_commit_of_the_repository_around_it(checkout, project):
    if project:
        (checkout / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        installed = checkout
    else:
        installed = checkout / "site-packages"
        installed.mkdir()
    found = record.provenance(checkout=installed)
    assert found["commit"] is None
    assert found["dirty"] is None


def test_source_that_is_not_under_version_control_has_no_commit(checkout, tmp_path):
    unpacked = checkout / "unpacked"  # an archive of the project, within a repository that does not track it
    unpacked.mkdir()
    (unpacked / "pyproject.toml").write_bytes((checkout / "pyproject.toml").read_bytes())
    assert record.provenance(checkout=unpacked)["commit"] is None
    assert record.write_diff(tmp_path, unpacked) is None


def test_without_git_there_is_no_commit(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.provenance(checkout=checkout)["commit"] is None


def test_a_git_hook_does_not_lead_to_its_own_repository(checkout, tmp_path, monkeypatch):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert record.provenance(checkout=checkout)["commit"] == commit


def test_the_command_can_be_typed_again_and_names_no_folder_of_the_program():
    argv = ["/somewhere/bin/expire-span", "task=copy", "name=two words"]
    assert record.command_line(argv) == "expire-span task=copy 'name=two words'"
    assert record.command_line(["/somewhere/expire_span/__main__.py", "-m"]) == "python -m expire_span -m"


def test_versions_name_what_decides_a_figure():
    versions = record.versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]
    assert {"numpy", "hydra-core"} <= versions.keys()
    assert ("cuda" in versions) == (torch.version.cuda is not None)


# Figures

def test_a_summary_is_strict_json_with_null_for_what_is_no_number(tmp_path):
    figures = {"test/bpb": math.nan, "test/accuracy": 1 / 3, "spans": (1.0, math.inf)}
    record.write_summary(tmp_path, {"figures": figures, "finished": True})
    written = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert written == {
        "figures": {"test/bpb": None, "test/accuracy": 1 / 3, "spans": [1.0, None]}, "finished": True,
    }


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    record.write_summary(tmp_path, {"finished": False})
    with pytest.raises(TypeError):
        record.write_summary(tmp_path, {"finished": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"finished": False}
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_leaves_the_old_summary(tmp_path):
    record.write_summary(tmp_path, {"finished": False})
    (tmp_path / "summary.json.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        record.write_summary(tmp_path, {"finished": True})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"finished": False}


def test_metrics_come_back_as_they_were_logged(tmp_path):
    rows = [{"update": 1, "train/loss": 1 / 3}, {"update": 2, "train/loss": 1e-300}]
    for row in rows:
        record.append_metrics(tmp_path / METRICS, row)
    assert record.read_metrics(tmp_path / METRICS) == rows


def test_a_metric_that_is_no_number_is_null_in_the_file_and_nan_when_read(tmp_path):
    record.append_metrics(tmp_path / METRICS, {"update": 1, "train/loss": math.inf})
    assert (tmp_path / METRICS).read_text() == '{"update": 1, "train/loss": null}\n'
    assert math.isnan(record.read_metrics(tmp_path / METRICS)[0]["train/loss"])


@pytest.mark.parametrize("value", ["0.3", True, None, torch.tensor(0.3)], ids=["text", "bool", "none", "tensor"])
def test_a_metric_of_another_type_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="train/loss"):
        record.append_metrics(tmp_path / METRICS, {"update": 1, "train/loss": value})
    assert not (tmp_path / METRICS).exists()


def test_numpy_numbers_are_numbers(tmp_path):
    row = {"update": torch.tensor(3).numpy()[()], "train/loss": torch.tensor(0.5).numpy()[()]}
    record.append_metrics(tmp_path / METRICS, row)
    assert record.read_metrics(tmp_path / METRICS) == [{"update": 3, "train/loss": 0.5}]


def test_truncation_keeps_the_update_it_resumes_from_and_forgets_later_ones(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upda')
    assert [row["update"] for row in record.read_metrics(path)] == [1, 2, 3]
    record.truncate_metrics(path, 2, end=9)
    record.append_metrics(path, {"update": 3})
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n{"update": 3}\n'


def test_a_last_line_without_its_line_break_is_kept_whole(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"update": 1}\n{"update": 2}')
    record.truncate_metrics(path, 2, end=9)
    record.append_metrics(path, {"update": 3})
    assert [row["update"] for row in record.read_metrics(path)] == [1, 2, 3]


def test_a_run_that_logged_nothing_can_be_truncated(tmp_path):
    record.truncate_metrics(tmp_path / METRICS, 5, end=9)
    assert not (tmp_path / METRICS).exists()


def test_a_broken_line_amid_others_is_named_rather_than_skipped(tmp_path):
    (tmp_path / METRICS).write_text('{"update": 1}\n{"upda\n{"update": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        record.read_metrics(tmp_path / METRICS)


# Who writes

@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    pytest.importorskip("fcntl")
    program = (
        "import sys; from expire_span.runner.record import lock\n"
        "with lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_with_the_process_and_the_way_out(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"in use by process {holder.pid}; .*hydra\.run\.dir") as refusal, \
            record.lock(tmp_path):
        pass
    assert "\n" not in str(refusal.value)


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    with record.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with record.lock(tmp_path):
        pass


def test_a_full_disk_is_said_with_the_file_and_the_way_on(tmp_path):
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match=r"/dev/full could not be written \(No space left on device\); .*resume=/dev"):
        record.append_metrics(path, {"update": 1})
