"""Makes Triton's interpreter fit for the tests of the kernels."""

import numpy
from triton.runtime import interpreter

from expire_span.kernels import triton_backend


def use_small_tiles(monkeypatch):
    """Let small inputs have several tiles, as the interpreter is too slow for large ones."""
    configs = {(element_size, 256): triton_backend.TileConfig(16, 16, 4, 1) for element_size in (2, 4)}
    for name in ("FORWARD", "FORWARD_DECODE", "BACKWARD_DQ", "BACKWARD_DKV"):
        monkeypatch.setattr(triton_backend, name, configs)


def multiply_bfloat16(monkeypatch):
    """Convert bfloat16 to float32 in products: triton 3.6 would multiply the bits as integers."""
    dot = interpreter.InterpreterBuilder.create_dot

    def to_float32(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, to_float32(a), to_float32(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
