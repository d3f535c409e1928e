"""Ctrl-C, SIGTERM and SIGHUP at any moment: what was done is saved, one line says how to go on, the code is 128 + n."""

import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from forked_command import forked_command
from tiny_config import COPY, tiny_config
from wait import wait_for_lines

from expire_span.runner import cli, stop_signals, trainer
from expire_span.runner import train as training
from expire_span.runner.errors import OutOfMemory, root_cause
from expire_span.runner.run_folder import checkpoint
from expire_span.runner.stop_signals import Stopped

SIGNALS = pytest.mark.parametrize("number", stop_signals.NUMBERS, ids=lambda number: number.name)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of the tests themselves, which a command that is ending does not restore."""
    before = {number: signal.getsignal(number) for number in stop_signals.NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def during(monkeypatch, module, name, act):
    """Let `act` happen in the middle of a function."""
    function = getattr(module, name)

    def function_with_it(*arguments, **keywords):
        act()
        return function(*arguments, **keywords)

    monkeypatch.setattr(module, name, function_with_it)


@SIGNALS
def test_a_process_that_gets_a_signal_twice_within_milliseconds_saves_and_says_how_to_resume(number, tmp_path):
    folder = tmp_path / "a run"
    overrides = [*COPY, "train.updates=100000", "run.checkpoint_every=100000", f"hydra.run.dir='{folder}'"]

    def send_twice(process):
        wait_for_lines(folder / "metrics.jsonl", lines=1)
        os.kill(process, number)
        time.sleep(0.002)
        os.kill(process, number)

    ended = forked_command(["expire-span", *overrides], tmp_path, during=send_twice)
    assert ended.code == 128 + number
    update = checkpoint.load(folder)["update"]
    assert ended.stderr.splitlines() == [
        "stopping once this update is saved; another signal stops at once, and saves nothing",
        f"stopped; update {update} is saved; to resume: expire-span 'resume={folder}'",
    ]


@SIGNALS
def test_a_signal_while_data_is_prepared_says_that_nothing_is_saved_yet(number, folder, monkeypatch):
    during(monkeypatch, trainer, "build_task", lambda: signal.raise_signal(number))
    with pytest.raises(Stopped) as stop:
        training.train(tiny_config(), folder)
    assert stop.value.code == 128 + number
    assert stop.value.message == "stopped; nothing is saved yet: run the same command again"


@SIGNALS
def test_a_run_that_is_stopped_in_its_final_evaluation_goes_on_with_that(number, folder, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, training, "evaluate", lambda: signal.raise_signal(number))
        with pytest.raises(Stopped) as stop:
            training.train(tiny_config(), folder)
    assert stop.value.message == f"stopped; update 4 is saved; to resume: expire-span resume={folder}"
    assert training.train(tiny_config(), folder)["test/loss"] > 0


def test_a_second_signal_after_a_second_stops_at_once_and_saves_nothing(folder, monkeypatch):
    monkeypatch.setattr(stop_signals, "REPEAT_SECONDS", 0)

    def interrupt_twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    during(monkeypatch, training, "train_step", interrupt_twice)
    with pytest.raises(Stopped, match="130") as stop:
        training.train(tiny_config(), folder)
    assert stop.value.message.startswith("stopped; nothing is saved yet")
    assert not checkpoint.paths(folder)


def test_a_signal_during_the_last_update_leaves_the_evaluation_to_the_resumed_run(folder, monkeypatch):
    with monkeypatch.context() as patch:
        during(patch, trainer.Trainer, "start_checkpoint", lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped) as stop:
            training.train(tiny_config("run.checkpoint_every=4"), folder)
    assert "update 4 is saved" in stop.value.message
    assert not (folder / "summary.json").exists()


def test_a_signal_outside_of_training_ends_with_one_word(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expire-span"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; monkeypatch restores it afterwards
    monkeypatch.setattr(cli, "hydra_main", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "stopped\n"


def test_a_run_under_nohup_outlives_its_terminal(folder, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    during(monkeypatch, training, "train_step", lambda: signal.raise_signal(signal.SIGHUP))
    assert training.train(tiny_config(), folder)["test/loss"] > 0


def test_training_leaves_the_handlers_of_the_program_that_calls_it(folder):
    before = [signal.getsignal(number) for number in stop_signals.NUMBERS]
    training.train(tiny_config(), folder)
    assert [signal.getsignal(number) for number in stop_signals.NUMBERS] == before


# Out of memory


def allocate_too_much_in_torch():
    torch.empty(10**15)


def allocate_too_much_in_numpy():
    np.empty(10**15)


def allocate_too_much_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")


@pytest.mark.parametrize(
    "allocate", [allocate_too_much_in_torch, allocate_too_much_in_numpy, allocate_too_much_on_a_gpu]
)
def test_out_of_memory_is_one_line_with_what_to_lower_and_what_is_saved(allocate, folder, monkeypatch):
    training.train(tiny_config("train.updates=2"), folder)
    during(monkeypatch, training, "train_step", allocate)
    with pytest.raises(
        OutOfMemory, match="out of memory .*allocate .*lower train.batch_size.*update 2 is saved"
    ) as end:
        training.train(tiny_config(), folder)
    assert re.fullmatch(r".*; to resume: expire-span resume=\S+", str(end.value))
    assert root_cause(end.value) is end.value


def test_out_of_memory_outside_of_training_is_a_user_error():
    with pytest.raises(RuntimeError) as end:
        allocate_too_much_in_torch()
    assert isinstance(root_cause(end.value), OutOfMemory)
