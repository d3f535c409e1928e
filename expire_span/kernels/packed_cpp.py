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

import torch
from torch import Tensor

SOURCES = [Path(__file__).with_name(name) for name in ("packed_cpp.cpp", "matrix.h")]
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma"]
VECTORS = {"AVX2": AVX2, "AVX512": [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}  # by torch's names


def command(compiler: str, target: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths  # imports much

    here = ["-DAT_PARALLEL_OPENMP=1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    here += VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    folders = [f"-I{each}" for each in include_paths()] + [f"-L{each}" for each in library_paths()]
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


def prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None,
    reach: Tensor | None,
    bias: Tensor | None,
    born: Tensor | None,
    dropout: float,
    seed: int,
) -> tuple:
    """The same in one dtype, as the operators want it."""
    dtype = torch.promote_types(query.dtype, torch.promote_types(span.dtype, torch.float32))
    block, size = query.shape[2:]
    shape = (len(key), query.shape[1])  # N, H
    table = None
    if position is not None and len(position) and len(key):
        farthest = min(len(position), max(1, int(age.max()) + block))  # but for what is farther than any key
        table = position[:farthest].to(dtype).flip(0)  # (P, D)
    return (
        query.to(dtype) / size**0.5,
        key.to(dtype),
        value.to(dtype),
        offsets.contiguous(),
        age.contiguous(),
        span.to(dtype).expand(shape),
        ramp,
        table,
        None if reach is None else reach.contiguous(),
        None if bias is None else bias.to(dtype).expand(shape),
        None if born is None else born.contiguous(),
        dropout,
        seed,
    )


@torch.no_grad()
def forward(query: Tensor, *given) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) in query's dtype, and the log-sum-exp of each query's scores (B, H, T)."""
    out, lse = torch.ops.expire_span_cpp.forward(*prepared(query, *given))
    return out.to(query.dtype), lse


@torch.no_grad()
def backward(
    gradient, out, lse, query, key, value, offsets, age, span, ramp, position, reach, bias, born, dropout, seed, needs
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, span, position and bias that `needs`, six bools, asks for."""
    call = prepared(query, key, value, offsets, age, span, ramp, position, reach, bias, born, dropout, seed)
    gradient = gradient.to(lse.dtype)
    delta = (gradient * out).sum(-1).contiguous()  # (B, H, T)
    of_query, of_key, of_value, of_span, of_table, of_bias = torch.ops.expire_span_cpp.backward(
        gradient, delta, lse, *call
    )
    of_position = None
    if position is not None:
        of_position = torch.zeros_like(position, dtype=lse.dtype)
        of_position[: len(of_table)] = of_table.flip(0)
    of_span = of_span.sum_to_size(span.shape)
    of_bias = None if bias is None else of_bias.sum_to_size(bias.shape)
    found = (of_query / query.shape[-1] ** 0.5, of_key, of_value, of_span, of_position, of_bias)
    wanted = (query, key, value, span, position, bias)
    return tuple(each.to(like.dtype) if need else None for each, like, need in zip(found, wanted, needs, strict=True))
