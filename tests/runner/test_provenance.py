"""A run folder says which code made its results."""

import subprocess
import sys

import pytest
import torch

from expire_span.runner.run_folder import provenance


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


def test_a_clean_checkout_gives_its_commit_and_no_diff(checkout, tmp_path):
    result = provenance.provenance(checkout=checkout)
    assert result["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert result["dirty"] is False
    assert provenance.write_diff(tmp_path, checkout) is None
    assert not (tmp_path / "diff.patch").exists()


def test_the_diff_of_a_dirty_checkout_applied_to_its_commit_gives_the_code_that_ran(checkout, tmp_path):
    (checkout / "code.py").write_text("new = 2\n")
    (checkout / "forgotten.py").write_text("")
    assert provenance.provenance(checkout=checkout)["dirty"] is True
    patch = provenance.write_diff(tmp_path, checkout)
    assert "# untracked: forgotten.py\n" in patch.read_text()
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", checkout, clone)
    git(clone, "apply", patch)
    assert (clone / "code.py").read_text() == "new = 2\n"


def test_an_untracked_file_alone_makes_a_checkout_dirty(checkout, tmp_path):
    (checkout / "forgotten.py").write_text("")
    assert provenance.provenance(checkout=checkout)["dirty"] is True
    assert provenance.write_diff(tmp_path, checkout).read_text() == "# untracked: forgotten.py\n"


def test_a_long_diff_is_truncated_and_says_so(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "DIFF_LIMIT", 1000)
    (checkout / "code.py").write_text("x = 1\n" * 10_000)
    text = provenance.write_diff(tmp_path, checkout).read_text()
    assert text.startswith("# truncated: the first 1000 of ")
    assert len(text) < 1100


def test_a_clean_checkout_removes_the_diff_of_an_earlier_start(checkout, tmp_path):
    (tmp_path / "diff.patch").write_text("of an earlier start")
    provenance.write_diff(tmp_path, checkout)
    assert not (tmp_path / "diff.patch").exists()


@pytest.mark.parametrize("project", ["someone-elses", None], ids=str)
def test_an_installed_copy_does_not_report_the_commit_of_a_repository_around_it(checkout, project):
    if project:
        (checkout / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        package_folder = checkout
    else:
        package_folder = checkout / "site-packages"
        package_folder.mkdir()
    result = provenance.provenance(checkout=package_folder)
    assert result["commit"] is None
    assert result["dirty"] is None


def test_source_that_is_not_under_version_control_has_no_commit(checkout, tmp_path):
    unpacked = checkout / "unpacked"  # an archive of the project, within a repository that does not track it
    unpacked.mkdir()
    (unpacked / "pyproject.toml").write_bytes((checkout / "pyproject.toml").read_bytes())
    assert provenance.provenance(checkout=unpacked)["commit"] is None
    assert provenance.write_diff(tmp_path, unpacked) is None


def test_without_git_there_is_no_commit(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.provenance(checkout=checkout)["commit"] is None


def test_within_a_git_hook_the_commit_is_still_that_of_the_checkout(checkout, tmp_path, monkeypatch):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert provenance.provenance(checkout=checkout)["commit"] == commit


def test_the_command_can_be_typed_again_and_does_not_contain_the_programs_folder():
    argv = ["/somewhere/bin/expire-span", "task=copy", "name=two words"]
    assert provenance.command_line(argv) == "expire-span task=copy 'name=two words'"
    assert provenance.command_line(["/somewhere/expire_span/__main__.py", "-m"]) == "python -m expire_span -m"


def test_versions_include_everything_that_can_change_a_result():
    versions = provenance.versions()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]
    assert {"numpy", "hydra-core"} <= versions.keys()
    assert ("cuda" in versions) == (torch.version.cuda is not None)
