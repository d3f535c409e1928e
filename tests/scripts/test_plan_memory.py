"""The peak of a training step's tensors is what the plan predicts."""

from pathlib import Path

import pytest
from tiny_config import each_model

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("model", each_model())
def test_the_peak_of_all_tensors_in_a_training_step_is_predicted_within_15_percent(model, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import plan_memory

    monkeypatch.setitem(plan_memory.SIZES, "tiny", (2, 64, 2, 256, 8, 32, 64))
    result = plan_memory.measure((model, "tiny", ()))
    predicted = result["predicted"] - result[plan_memory.OVERHEAD]
    assert predicted == pytest.approx(result["allocated"], rel=0.15)
