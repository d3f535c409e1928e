"""`run.profile=true` leaves a trace and a line, and changes no result."""

import gzip
import json
import logging

import pytest
from tiny_config import tiny_config

from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train


def losses(folder):
    return [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folders = []
    for profile in ("true", "false"):
        folder = tmp_path_factory.mktemp(profile)
        config = tiny_config("train.updates=9", "run.log_every=1", f"run.profile={profile}", "transformer.dropout=0.1")
        train(config, folder)
        folders.append(folder)
    return folders


def test_the_losses_are_those_of_a_run_without_it(profiled):
    with_profile, without = profiled
    assert losses(with_profile) == losses(without)
    assert len(losses(without)) == 9
    assert not (without / "trace.json.gz").exists()


def test_the_trace_holds_two_updates_after_the_first_five(profiled):
    trace = json.loads(gzip.decompress((profiled[0] / "trace.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert sorted({name for name in names if name.startswith("ProfilerStep")}) == ["ProfilerStep#5", "ProfilerStep#6"]
    assert "aten::mm" in names


def test_the_ten_dearest_operations_are_one_line_of_the_log(folder, caplog):
    with caplog.at_level(logging.INFO):
        train(tiny_config("train.updates=8", "run.profile=true"), folder)
    [line] = [record.message for record in caplog.records if record.message.startswith("run.profile: of ")]
    shares = [float(part.split()[-2]) for part in line.partition("updates: ")[2].split(";")[0].split(", ")]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5


def test_a_run_too_short_to_be_recorded_says_so(folder, caplog):
    train(tiny_config("train.updates=4", "run.profile=true"), folder)
    assert "run.profile: nothing was recorded, as this start had no more than 5 updates" in caplog.text
    assert not (folder / "trace.json.gz").exists()
