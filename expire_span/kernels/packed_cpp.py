"""Packed attention in C++, for the CPU: compiled by the machine's own compiler when it is first needed, and kept."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_suffix(".cpp"), *sorted(Path(__file__).parent.glob("*.h"))]
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma"]
VECTORS = {"AVX2": AVX2, "AVX512": [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}  # by torch's names


def command(compiler: str, target: Path) -> list[str]:
    here = ["-DAT_PARALLEL_OPENMP=1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    here += VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    home = Path(torch.__file__).parent  # torch.utils.cpp_extension knows it too, but warns where CUDA finds no device
    folders = [f"-I{home / 'include'}", f"-L{home / 'lib'}"]
    return [*shlex.split(compiler), *FLAGS, *here, *folders, str(SOURCES[0]), "-o", str(target), "-ltorch_cpu", "-lc10"]


@cache
def available() -> bool:
    """Whether the operators are there; compiles them where they are not yet. Says on stderr what it does."""
    if sys.platform != "linux":
        return False
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
    try:
        recipe = " ".join(command(compiler, Path())) + torch.__version__ + "".join(each.read_text() for each in SOURCES)
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expire-span"
        library = folder / f"attention-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            print("expire-span: compiling the attention for this CPU, once (some 20 seconds)", file=sys.stderr)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                fresh = Path(scratch) / library.name
                subprocess.run(command(compiler, fresh), check=True, capture_output=True, text=True)
                fresh.replace(library)  # whole, or not at all: other processes may do the same meanwhile
        torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        why = next((line for line in lines if "error" in line), lines[0])
        print(f"expire-span: attention takes twice as long, as its C++ cannot be had: {why}", file=sys.stderr)
        return False
    return True


@torch.no_grad()
def forward(*given: Any) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) in query's dtype, and the log-sum-exp of each query's scores (B, H, T)."""
    return torch.ops.expire_span_cpp.forward(*given)


@torch.no_grad()
def backward(*given_and_needs: Any) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, span, position and bias that the last argument, six bools, asks for."""
    *given, needs = given_and_needs
    found = torch.ops.expire_span_cpp.backward(*given)
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))
