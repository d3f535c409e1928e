"""Every test: one thread, so that timings and sums do not depend on the machine; no network, no account."""

import os
import shutil

import pytest
import torch

torch.set_num_threads(1)
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports Triton


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """A cache folder for the tests, with the attention that was compiled for other programs, or is now."""
    from expire_span.cache_folder import cache_dir
    from expire_span.kernels import cpp_backend

    cpp_backend.available()
    folder = tmp_path_factory.mktemp("cache")
    for library in cache_dir().glob("attention-*.so"):
        shutil.copy(library, folder)
    os.environ["EXPIRE_SPAN_CACHE"] = str(folder)
