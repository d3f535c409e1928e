"""The first 20 losses of each model, in float64, equal those written down: refactoring must not change them."""

import json
import tempfile
from pathlib import Path

import pytest
from tiny_config import tiny_config

from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train

EXPECTED_PATH = Path(__file__).parents[1] / "expected" / "losses.json"
EXPECTED = json.loads(EXPECTED_PATH.read_text())


def loss_curve(model, folder):
    text = folder / "text.txt"
    text.write_text("".join(f"{number} is {'even' if number % 2 == 0 else 'odd'}; " for number in range(400)))
    overrides = ["train.updates=20", "run.log_every=1", "run.precision=float64", "run.checkpoint_every=20"]
    memory = ["memory.alpha=1e-3", "memory.init_span_ratio=0.5"]
    run = folder / "run"
    run.mkdir()
    train(tiny_config(f"model={model}", *memory, *overrides, task="text", text=text), run)
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("model", EXPECTED)
def test_the_first_20_losses_are_as_written_down(model, tmp_path):
    assert loss_curve(model, tmp_path) == pytest.approx(EXPECTED[model], rel=1e-5), (
        "if the change is intended, write new ones: PYTHONPATH=tests/support python tests/runner/test_losses.py"
    )


if __name__ == "__main__":
    curves = {}
    for name in EXPECTED:
        with tempfile.TemporaryDirectory() as temporary_folder:
            curves[name] = [round(loss, 7) for loss in loss_curve(name, Path(temporary_folder))]
    EXPECTED_PATH.write_text(json.dumps(curves, indent=1) + "\n")
