"""Compile the Triton kernels for a GPU of some compute capability, without one, for calls of many kinds.

Usage: python compile_triton.py 90
"""

import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from expire_span.kernels import triton_backend
from expire_span.kernels.inputs import AttentionInputs


class CompileOnly:
    """Stands in for a kernel: compiles it where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda **arguments: self.kernel.warmup(grid=grid, **arguments)


def compile_call(dtype, head_dim, positions, dropout, optional_inputs, block=64, heads=2):
    offsets = torch.tensor([[0, 60, 100], [100, 100 + block, 100 + 2 * block]])
    total = int(offsets[-1, -1])
    inputs = AttentionInputs(
        query=torch.zeros(2, block, heads, head_dim, dtype=dtype).transpose(1, 2),
        key=torch.zeros(total, heads, head_dim, dtype=dtype),
        value=torch.zeros(total, heads, head_dim, dtype=dtype),
        offsets=offsets,
        age=torch.zeros(total, dtype=torch.long),
        span=torch.zeros(total, 1),
        ramp=16.0,
        position=torch.zeros(positions, head_dim) if positions else None,
        rows=None,
        reach=torch.zeros(2, block, dtype=torch.long) if optional_inputs else None,
        bias=torch.zeros(total, heads) if optional_inputs else None,
        min_distance=torch.ones(total, dtype=torch.long),
        dropout=dropout,
        seed=5,
    )
    out, lse = triton_backend.forward(inputs)
    if block > 1:
        needs_grad = (True, True, True, True, positions > 0, optional_inputs)
        triton_backend.backward(out, out, lse, inputs, needs_grad)


def main(capability):
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target,
        set_current_device=lambda device: None, get_active_torch_device=lambda: torch.device("cpu"),
    ))  # fmt: skip
    for name in ("forward_kernel", "backward_dq_kernel", "backward_dkv_kernel"):
        setattr(triton_backend.kernels, name, CompileOnly(getattr(triton_backend.kernels, name)))
    for dtype in (torch.float32, torch.bfloat16):
        compile_call(dtype, 64, 32, 0.3, optional_inputs=False)
        compile_call(dtype, 128, 0, 0.0, optional_inputs=True)
    compile_call(torch.bfloat16, 64, 32, 0.0, optional_inputs=False, block=1)
    print("compiled")


if __name__ == "__main__":
    main(int(sys.argv[1]))
