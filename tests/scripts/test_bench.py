"""The benchmark runs, and refuses options that it would ignore."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


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
