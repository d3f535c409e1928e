"""What a run sets up before it starts."""

import subprocess
import sys

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.build import setup_runtime


def test_a_plain_start_does_not_import_the_compiler():
    code = (
        "import sys, torch; from tiny_config import tiny_config; from expire_span.runner.build import setup_runtime; "
        "setup_runtime(tiny_config()); print([name for name in ('torch._inductor', 'wandb') if name in sys.modules])"
    )
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=paths)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("first", [True, False])
def test_determinism_is_what_the_config_says_whatever_it_was(first):
    try:
        torch.use_deterministic_algorithms(first)
        for deterministic in (True, False):
            setup_runtime(tiny_config(f"run.deterministic={deterministic}"))
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
