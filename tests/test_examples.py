"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


BUTLER = "the butler walks to the kitchen. " * 200


@pytest.mark.parametrize("text", [None, pytest.param(BUTLER, marks=pytest.mark.slow)])
def test_the_span_example_prints_its_figures_and_draws_them(text, tmp_path):
    arguments = ["--updates", "3", "--output", str(tmp_path / "new/spans.png")]
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
        arguments.append(str(tmp_path / "text.txt"))
    command = [sys.executable, str(EXAMPLES / "spans_of_a_text.py"), *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "update 3:" in out
    assert "bpb, memory size" in out.splitlines()[-2]
    assert (tmp_path / "new/spans.png").stat().st_size > 10_000
