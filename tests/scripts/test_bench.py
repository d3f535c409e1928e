"""The cost model counts what torch counts, and the benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.memory.packed import from_dense

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def cost_model(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import cost_model

    return cost_model


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_cost_model_counts_the_operations_that_torch_counts(cost_model, pre_norm):
    sizes = {
        "num_layers": 2,
        "hidden_size": 12,
        "num_heads": 3,
        "feedforward_size": 20,
        "vocab_size": 30,
        "batch_size": 2,
        "block_size": 8,
    }
    cost = cost_model.TrainStepCost(**sizes, num_memories=32, num_positions=32, pre_norm=pre_norm)
    config = TransformerConfig(30, 12, 3, 20, attention_backend="reference", pre_norm=pre_norm)
    model = Transformer(config, [TransXL(32) for _ in range(2)])
    past = from_dense(torch.randn(2, 32, 12), torch.arange(-32, 0))
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(30, (2, 8)), {"step": torch.tensor(0), "layers": [past, past]})[0].sum().backward()
    assert sum(cost.operations().values()) == counter.get_total_flops()


def test_the_roofline_is_the_longer_of_computing_and_moving(cost_model):
    sizes = {
        "num_layers": 2,
        "hidden_size": 12,
        "num_heads": 3,
        "feedforward_size": 20,
        "vocab_size": 30,
        "batch_size": 2,
        "block_size": 8,
    }
    cost = cost_model.TrainStepCost(**sizes, num_memories=100, num_positions=8)
    assert cost.roofline_seconds(cost_model.Device("slow", 1e6, 1e30)) == sum(cost.operations().values()) / 1e6
    assert cost.roofline_seconds(cost_model.Device("narrow", 1e30, 1e6)) == cost.bytes() / 1e6


def test_options_that_a_preset_would_ignore_are_refused():
    command = [sys.executable, str(SCRIPTS / "bench.py"), "--preset=table4", "--predict"]
    predicted = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(predicted.splitlines()) == 12
    assert "enwik8, compressive, span 16,384, 7,168 memories" in predicted  # 4096 and 3072 pooled ones
    refused = subprocess.run([*command, "--num-layers=2", "--span=64"], capture_output=True, text=True, check=False)
    assert "--preset table4 has values of its own for num_layers, span; omit them" in refused.stderr


def test_the_benchmark_prints_ratios_and_saves_its_results(tmp_path):
    sizes = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "feedforward_size": 16,
        "vocab_size": 9,
        "block_size": 8,
        "ramp": 4,
    }
    shape = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    options = ["--batch-size=2", "--span=64", "--keep-prob=0.5", "--repeats=2", f"--folder={tmp_path}"]
    command = [sys.executable, str(SCRIPTS / "bench.py"), *shape, *options]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "x fewer saved bytes" in output
    fused, reference = json.loads((tmp_path / "expire_span.json").read_text())["cases"]
    assert (fused["variant"], reference["variant"]) == ("fused", "reference")
    assert 20 < fused["num_memories"] < 44  # half of 64, by chance
    assert fused["saved_mb"] < reference["saved_mb"]
