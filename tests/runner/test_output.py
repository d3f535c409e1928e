"""A run does not depend on what is around it: a reader of its output, or a home folder of its user."""

import os
import subprocess
import sys

import pytest
from forked_command import forked_command
from tiny_config import COPY

EXPIRE_SPAN = [sys.executable, "-m", "expire_span"]


def test_a_run_whose_reader_has_gone_ends_well_and_says_so_once_in_its_log(folder):
    command = [*EXPIRE_SPAN, *COPY, "train.updates=20", f"hydra.run.dir={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline().startswith("training in")
        run.stdout.close()
        errors = run.stderr.read()
    assert (run.returncode, errors) == (0, "")
    assert (folder / "run.log").read_text().count("stdout cannot be written any more (Broken pipe)") == 1
    assert (folder / "summary.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
def test_a_run_whose_output_is_full_ends_well(folder):
    with open("/dev/full", "w") as full:
        command = [*EXPIRE_SPAN, *COPY, f"hydra.run.dir={folder}"]
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == 0
    assert (folder / "run.log").read_text().count("stdout cannot be written any more (No space left on device)") == 1
    assert (folder / "summary.json").exists()


def test_a_wrong_flag_is_one_line_that_names_it_and_the_program(folder):
    ended = forked_command(["expire-span", "--sweep"], folder)
    assert ended.stderr == "error: unrecognized arguments: --sweep; see expire-span --help\n"


NO_USER = """
import pwd
def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = getpwuid
from expire_span.runner.cli import main
main()
"""


@pytest.mark.slow
def test_a_user_without_a_home_folder_or_a_name_can_train(folder):
    command = [sys.executable, "-c", NO_USER, *COPY, "wandb.mode=offline", f"hydra.run.dir={folder}"]
    result = subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "summary.json").exists()


def test_without_a_home_folder_data_needs_a_folder_that_the_message_asks_for(folder):
    command = [sys.executable, "-c", NO_USER, "task=collision", "size=mini", "wandb.mode=disabled"]
    command.append(f"hydra.run.dir={folder}")
    result = subprocess.run(command, env={}, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("set EXPIRE_SPAN_CACHE to a folder")
