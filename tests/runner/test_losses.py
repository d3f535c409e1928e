"""The first 20 losses of each model, in float64, as they were when they were last meant to change."""

import json
from pathlib import Path

import pytest
from tiny import tiny

from expire_span.runner.loop import train
from expire_span.runner.record import read_metrics

EXPECTED = Path(__file__).parents[1] / "expected" / "losses.json"


def curve(model, folder):
    text = folder / "text.txt"
    text.write_text("".join(f"{number} is {'even' if number % 2 == 0 else 'odd'}; " for number in range(400)))
    overrides = ["train.updates=20", "run.log_every=1", "run.precision=float64", "run.checkpoint_every=20"]
    run = folder / "run"
    run.mkdir()
    train(tiny(f"model={model}", "memory.alpha=1e-3", "memory.init=0.5", *overrides, task="text", text=text), run)
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.parametrize("model", ["trans_xl", "adaptive_span", "compressive", "expire_span"])
def test_the_first_20_losses_are_as_written_down(model, tmp_path):
    losses = curve(model, tmp_path)
    assert losses == pytest.approx(json.loads(EXPECTED.read_text())[model], rel=1e-5), (
        "if the change is meant, write the new curves down: PYTHONPATH=tests/support python tests/runner/test_losses.py"
    )


if __name__ == "__main__":
    import tempfile

    curves = {}
    for name in ("trans_xl", "adaptive_span", "compressive", "expire_span"):
        with tempfile.TemporaryDirectory() as folder:
            curves[name] = [round(loss, 7) for loss in curve(name, Path(folder))]
    EXPECTED.write_text(json.dumps(curves, indent=1) + "\n")
