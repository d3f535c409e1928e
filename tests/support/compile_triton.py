"""Compiles the Triton kernels as a GPU of a compute capability would have them, without one, for calls of many kinds.

    python compile_triton.py 90
"""

import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from expire_span.kernels import packed_triton


class Compiled:
    """In a kernel's place: compiles what would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda **arguments: self.kernel.warmup(grid=grid, **arguments)


def call(dtype, size, positions, dropout, options, block=64, heads=2):
    offsets = torch.tensor([[0, 60, 100], [100, 100 + block, 100 + 2 * block]])
    total = int(offsets[-1, -1])
    given = {
        "query": torch.zeros(2, block, heads, size, dtype=dtype).transpose(1, 2),
        "key": torch.zeros(total, heads, size, dtype=dtype),
        "value": torch.zeros(total, heads, size, dtype=dtype),
        "offsets": offsets,
        "age": torch.zeros(total, dtype=torch.long),
        "span": torch.zeros(total, 1),
        "ramp": 16.0,
        "position": torch.zeros(positions, size) if positions else None,
        "rows": None,
        "reach": torch.zeros(2, block, dtype=torch.long) if options else None,
        "bias": torch.zeros(total, heads) if options else None,
        "born": torch.ones(total, dtype=torch.long),
        "dropout": dropout,
        "seed": 5,
    }
    out, lse = packed_triton.forward(**given)
    if block > 1:
        packed_triton.backward(out, out, lse, **given, needs=(True, True, True, True, positions > 0, options))


def main(capability):
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target,
        set_current_device=lambda device: None, get_active_torch_device=lambda: torch.device("cpu"),
    ))  # fmt: skip
    for name in ("forward", "backward_queries", "backward_keys"):
        setattr(packed_triton.kernels, name, Compiled(getattr(packed_triton.kernels, name)))
    for dtype in (torch.float32, torch.bfloat16):
        call(dtype, 64, 32, 0.3, options=False)
        call(dtype, 128, 0, 0.0, options=True)
    call(torch.bfloat16, 64, 32, 0.0, options=False, block=1)
    print("compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
