"""Every test: one thread, so that timings and sums do not depend on the machine; no network, no account."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports Triton


@pytest.fixture(scope="session", autouse=True)
def _compile_the_attention():
    """Before a test sets a cache folder of its own, in which it would be compiled once more."""
    from expire_span.kernels import cpp_backend

    cpp_backend.available()
