"""Tokens and operations per second of a device, in the log and in the summary."""

import json

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.build import build_model
from expire_span.runner.logging.throughput import throughput
from expire_span.runner.step_cost import StepCost
from expire_span.runner.train import train
from expire_span.runner.trainer import build_task

MEASURED = {"perf/tokens_per_second": 640.0, "perf/ms_per_batch": 100.0, "memory/held": 20.0}


@pytest.fixture(scope="module")
def run():
    config = tiny_config()
    model = build_model(config, build_task(config), torch.device("cpu"))
    operations = sum(StepCost(model.config, 2, 4, 16, num_memories=20, num_positions=16).operations().values())
    return config, model, operations


def test_the_summary_has_tokens_and_operations_of_a_device_and_no_share_of_an_unknown_peak(folder):
    train(tiny_config("train.updates=4"), folder)
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert metrics["perf/tokens_per_second_per_device"] == metrics["perf/tokens_per_second"]
    assert metrics["perf/model_tflops_per_second"] > 0
    assert "perf/model_flops_utilization" not in metrics


def test_the_operations_are_those_of_the_memories_held_over_the_time_of_a_training_step(run):
    config, model, operations = run
    figures = throughput(config, model, torch.device("cpu"), MEASURED)
    assert figures["perf/model_tflops_per_second"] == pytest.approx(operations / 0.1 / 1e12)


def test_several_processes_share_tokens_and_operations(run, monkeypatch):
    config, model, operations = run
    monkeypatch.setattr("expire_span.runner.logging.throughput.world_size", lambda: 4)
    figures = throughput(config, model, torch.device("cpu"), MEASURED)
    assert figures["perf/tokens_per_second_per_device"] == 160
    assert figures["perf/model_tflops_per_second"] == pytest.approx(operations / 4 / 0.1 / 1e12)


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 67e12), ("NVIDIA T4", None)])
def test_a_device_whose_peak_is_known_has_a_share_of_it(run, name, peak, monkeypatch):
    config, model, operations = run
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    share = throughput(config, model, torch.device("cuda"), MEASURED).get("perf/model_flops_utilization")
    assert share == (peak and pytest.approx(operations / 0.1 / peak))  # in float32, as the config says


def test_where_the_model_acts_only_tokens_are_counted(run):
    config, model, _ = run
    assert set(throughput(config, model, torch.device("cpu"), {**MEASURED, "perf/ms_per_rollout": 50.0})) == {
        "perf/tokens_per_second_per_device"
    }
    assert throughput(config, model, torch.device("cpu"), {}) == {}
