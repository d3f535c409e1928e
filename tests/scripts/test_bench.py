"""The benchmark counts what there is to count, and runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.memory.packed import dense

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cost_model

    return cost_model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_cost_model_counts_the_operations_that_torch_counts(cost_model, pre_norm):
    sizes = {"layers": 2, "hidden": 12, "heads": 3, "feedforward": 20, "vocabulary": 30, "batch": 2, "block": 8}
    step = cost_model.Step(**sizes, survivors=32, positions=32, pre_norm=pre_norm)
    config = TransformerConfig(30, 12, 3, 20, kernel="definition", pre_norm=pre_norm)
    model = Transformer(config, [TransXL(32) for _ in range(2)])
    past = dense(torch.randn(2, 32, 12), torch.arange(-32, 0))
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(30, (2, 8)), {"now": torch.tensor(0), "layers": [past, past]})[0].sum().backward()
    assert sum(step.operations().values()) == counter.get_total_flops()


def test_the_floor_is_the_slower_of_computing_and_moving(cost_model):
    sizes = {"layers": 2, "hidden": 12, "heads": 3, "feedforward": 20, "vocabulary": 30, "batch": 2, "block": 8}
    step = cost_model.Step(**sizes, survivors=100, positions=8)
    assert step.floor(cost_model.Device("slow", 1e6, 1e30)) == sum(step.operations().values()) / 1e6
    assert step.floor(cost_model.Device("narrow", 1e30, 1e6)) == step.bytes() / 1e6


def test_options_that_a_preset_would_not_heed_are_refused():
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--preset=table4", "--predict"]
    predicted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(predicted.splitlines()) == 12
    assert "enwik8, compressive, span 16,384, 7,168 survivors" in predicted  # 4096 and 3072 pooled ones
    refused = subprocess.run([*command, "--layers=2", "--span=64"], capture_output=True, text=True, check=False)
    assert "--preset table4 has values of its own for layers, span; leave them away" in refused.stderr


def test_the_benchmark_tells_a_ratio_and_leaves_its_figures(tmp_path):
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "feedforward": 16, "vocabulary": 9, "block": 8, "ramp": 4}
    shape = [f"--{name}={value}" for name, value in sizes.items()]
    how = ["--batch=2", "--span=64", "--kept=0.5", "--repeats=2", f"--folder={tmp_path}"]
    command = [sys.executable, str(SCRIPTS / "bench.py"), *shape, *how]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "x fewer saved bytes" in said
    fused, definition = json.loads((tmp_path / "expire_span.json").read_text())["cases"]
    assert (fused["form"], definition["form"]) == ("fused", "definition")
    assert 20 < fused["survivors"] < 44  # half of 64, by lot
    assert fused["saved_mb"] < definition["saved_mb"]
