"""The command in several processes: one run folder, one voice, and an end for all when one ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from forked_command import forked_command
from forked_ranks import environment_of, forked_rank_commands, run_ranks
from rank_functions import message_of_lock
from tiny_config import COPY, SMALL_SIZES
from wait import wait_for_lines

from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.files import read_metrics

TEXT = ["task=text", "memory.max_span=32", *SMALL_SIZES]
LONG = ["train.updates=100000", "run.log_every=1", "run.checkpoint_every=3", "lr_schedule.final_updates=0"]


def said(ended):
    """How a process has said that it ended."""
    return [line for line in ended.stderr.splitlines() if line.startswith(("error", "stopped"))]


def test_torchrun_trains_one_model_in_one_folder_and_says_everything_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "expire_span", *COPY, "hydra.run.dir=runs/${now:%H-%M-%S-%f}"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.count("\ntest/loss ") == 1
    [folder] = (tmp_path / "runs").iterdir()
    log = (folder / "run.log").read_text()
    assert log.count("training in ") == 1
    assert len([row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]) == 2
    assert sorted(path.name for path in folder.glob("*rank*")) == [
        f"checkpoint_{update}.rank_{rank}_of_2.pt" for update in (2, 4) for rank in (0, 1)
    ]
    assert json.loads((folder / "summary.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("number", "rank", "message"),
    [
        (signal.SIGKILL, 1, "error: another rank has ended; update "),
        pytest.param(
            *(signal.SIGSTOP, 1, "error: another rank does not answer, see run.rank_timeout; update "),
            marks=pytest.mark.slow,
        ),
        (signal.SIGTERM, 1, "stopped; update "),
        (signal.SIGINT, 0, "stopped; update "),
    ],
)
def test_a_rank_that_ends_or_hangs_ends_all_with_one_line_and_a_checkpoint(number, rank, message, tmp_path):
    times = []

    def send(processes):
        wait_for_lines(tmp_path / "run/metrics.jsonl", lines=7)
        os.kill(processes[rank].pid, number)
        times.append(time.monotonic())

    command = ["expire-span", *COPY, *LONG, "run.rank_timeout=3", "hydra.run.dir=run"]
    ended = forked_rank_commands(2, command, tmp_path, during=send)
    assert time.monotonic() - times[0] < 30
    [line] = said(ended[0])
    assert line.startswith(message)
    assert f"to resume: expire-span resume={tmp_path}/run" in line
    assert ended[0].code == (1 if number in (signal.SIGKILL, signal.SIGSTOP) else 128 + number)
    update = checkpoint.load(tmp_path / "run", slice(0, 4))["update"]
    assert f"update {update} is saved" in line
    if number in (signal.SIGTERM, signal.SIGINT):  # all ranks have stopped after the same update
        assert ended[1].code == ended[0].code
        assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["update"] == update
        assert not said(ended[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*COPY, "train.batch_size=3"], "error: train.batch_size=3 cannot be divided among 2 processes"),
        ([*COPY, "optimiser.lr=1"], "error: optimiser.lr is called optimizer.lr"),
        ([*TEXT, "task.path=nowhere.txt"], "error: task.path=nowhere.txt does not exist"),
        ([*COPY, "-m", "seed=1,2"], "error: a sweep starts the processes of its jobs itself"),
    ],
)
def test_what_all_ranks_refuse_is_said_once(overrides, message, tmp_path):
    ended = forked_rank_commands(2, ["expire-span", *overrides, "hydra.run.dir=run"], tmp_path)
    assert [each.code for each in ended] == [1, 1]
    [line] = said(ended[0])
    assert line.startswith(message)
    assert not said(ended[1])


def test_what_one_rank_refuses_is_said_by_rank_0(tmp_path):
    """Another rank has another config, or its own folder has no data."""
    command = ["expire-span", *COPY, "hydra.run.dir=run"]
    ended = forked_rank_commands(2, command, tmp_path, extra={1: ["seed=7"]})
    assert [each.code for each in ended] == [1, 1]
    assert said(ended[0]) == ["error: rank 1 has another config than rank 0; start all with the same command"]
    assert not said(ended[1])
    (tmp_path / "here").mkdir()
    (tmp_path / "here/text.txt").write_text("to be or not to be " * 300)
    command = ["expire-span", *TEXT, "task.path=text.txt", f"hydra.run.dir={tmp_path}/run2"]
    ended = forked_rank_commands(2, command, tmp_path / "here", folders={1: tmp_path})
    assert [each.code for each in ended] == [1, 1]
    [line] = said(ended[0])
    assert line.startswith("error: rank 1: task.path=text.txt does not exist")


def test_help_is_printed_once(tmp_path):
    ended = forked_rank_commands(2, ["expire-span", "--help"], tmp_path)
    assert [each.code for each in ended] == [0, 0]
    assert "expire-span" in ended[0].stdout
    assert ended[1].stdout == ""


def test_a_port_in_use_is_named_with_what_to_do(tmp_path):
    (tmp_path / "here").mkdir()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = environment_of(rank=0, world_size=2, port=port)
        ended = forked_command(["expire-span", *COPY], tmp_path / "here", environment=environment.items())
    assert ended.code == 1
    [line] = said(ended)
    assert line.startswith(f"error: 127.0.0.1:{port} is in use by another program; set MASTER_PORT, or ")


def test_a_folder_that_another_rank_does_not_see_is_refused(tmp_path):
    for error in run_ranks(2, message_of_lock, tmp_path):
        assert "is not one folder for all processes" in error
