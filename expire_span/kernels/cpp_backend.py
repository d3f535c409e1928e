"""The C++ backend for the CPU: compiled by the machine's own compiler when it is first needed, and cached."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cache_folder import cache_dir
from .inputs import AttentionInputs

SOURCES = [Path(__file__).with_name("attention.cpp"), *sorted(Path(__file__).parent.glob("*.h"))]
FLAGS = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wfatal-errors"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]
VECTOR_FLAGS = {"AVX2": AVX2, "AVX512": AVX512}  # by torch's names for what a CPU can do


def compile_command(compiler: str, target: Path) -> list[str]:
    """The command that compiles the operators to the shared library `target`."""
    flags = [*FLAGS, "-DAT_PARALLEL_OPENMP=1", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    # torch.utils.cpp_extension knows these folders too, but warns where a CUDA build of torch finds no device.
    torch_folder = Path(torch.__file__).parent
    flags += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    return [*shlex.split(compiler), *flags, str(SOURCES[0]), "-o", str(target), "-ltorch_cpu", "-lc10"]


@cache
def available() -> bool:
    """Load the operators, after compiling them if the cache does not have them; return whether that worked.

    Prints to stderr when it compiles, and why it could not.
    """
    if sys.platform != "linux":
        return False
    try:
        torch.ops.load_library(compiled_library())
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0])
        return unavailable(f"its C++ did not compile, which takes g++ 12 or later: {reason}")
    except (OSError, RuntimeError) as error:
        return unavailable(f"its C++ cannot be used: {str(error).splitlines()[0]}")
    return True


def unavailable(reason: str) -> bool:
    print(f"expire-span: attention takes twice as long, as {reason}", file=sys.stderr)
    return False


def compiled_library() -> Path:
    """Return the operators as a shared library of the cache folder, which is compiled unless it is there and whole."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
    command = " ".join(compile_command(compiler, Path()))
    cache_key = command + torch.__version__ + "".join(source.read_text() for source in SOURCES)
    library = cache_dir() / f"attention-{hashlib.sha256(cache_key.encode()).hexdigest()[:16]}.so"
    if not is_whole(library):
        print("expire-span: compiling the attention for this CPU, once (some 20 seconds)", file=sys.stderr)
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            compiled = Path(scratch) / library.name
            subprocess.run(compile_command(compiler, compiled), check=True, capture_output=True, text=True)
            with compiled.open("r+b") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                file.write(digest)  # at the end, where a loader does not look
            compiled.replace(library)  # atomic, as other processes may be compiling it too
    return library


def is_whole(library: Path) -> bool:
    """Return whether a library ends with the hash of what precedes it. Loading a damaged one can kill the process."""
    content = library.read_bytes() if library.exists() else b""
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


@torch.no_grad()
def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, D) in the dtype of query, and lse (B, H, T), the log-sum-exp of each query's scores."""
    return torch.ops.expire_span_cpp.forward(*inputs)


@torch.no_grad()
def backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of query, key, value, span, position and bias, or None where needs_grad is False."""
    grads = torch.ops.expire_span_cpp.backward(grad_out, out, lse, *inputs)
    return [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]
