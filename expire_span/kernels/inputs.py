"""The inputs of packed attention, which every backend takes.

A new input is a field here, an argument of `packed_span_attention`, and code in the backends that use it. The C++
functions take the fields one by one, in this order. Tensors come first, so that autograd can save them by a slice.
"""

from typing import NamedTuple

from torch import Tensor

DIFFERENTIABLE = ("query", "key", "value", "span", "position", "bias")


class AttentionInputs(NamedTuple):
    """The arguments of `packed_span_attention`, which explains them, in the shapes that backends rely on."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (N, H, D)
    value: Tensor  # (N, H, D)
    offsets: Tensor  # (parts, B + 1) int64
    age: Tensor  # (N,) int64
    span: Tensor  # (N or 1, H or 1)
    position: Tensor | None  # (n, D)
    rows: Tensor | None  # (P,) int64
    reach: Tensor | None  # (B, T) int64
    bias: Tensor | None  # (N or 1, H or 1)
    min_distance: Tensor | None  # (N,) int64
    ramp: float
    dropout: float = 0.0
    seed: int = 0  # of the dropout; the fused backends draw the same mask from it in forward and backward
