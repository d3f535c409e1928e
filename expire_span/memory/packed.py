"""Packed memory: every sample keeps its own survivors, back to back, without padding.

    sample 0        sample 1   sample 2
    h h h h h h h   h h        h h h h        hidden (N, d)
    0               7          9       13     offsets (B + 1,)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import samples_of


class Memory(NamedTuple):
    """What a layer remembers: rows grouped by sample, the oldest first."""

    hidden: Tensor  # (N, d)
    time: Tensor  # (N,) int64: the timestep at which each was made
    born: Tensor  # (N,) int64: the least distance at which it is seen: 1, or more for one pooled out of others
    offsets: Tensor  # (B + 1,) int64: sample b owns rows offsets[b] to offsets[b + 1]
    projected: tuple[Tensor, ...] | None = None  # keys and values (N, H, D), and spans (N, H or 1), if already known


def empty(samples: int, hidden_size: int, like: Tensor) -> Memory:
    """No memories, with the device and dtype of `like`."""
    none = torch.zeros(0, dtype=torch.long, device=like.device)
    return Memory(like.new_zeros(0, hidden_size), none, none, none.new_zeros(samples + 1))


def dense(hidden: Tensor, time: Tensor, born: int = 1) -> Memory:
    """The same number for every sample: hidden (B, M, d), made at time (M,)."""
    samples, each, _ = hidden.shape
    offsets = torch.arange(samples + 1, device=time.device) * each
    return Memory(hidden.flatten(0, 1), time.repeat(samples), time.new_full((samples * each,), born), offsets)


class Interleave(torch.autograd.Function):
    """first (n, ...) and second (m, ...) as one (n + m, ...) in another order; a gradient is only looked up."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.first = len(first)
        return torch.cat([first, second]).index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        parts = zip((place[: ctx.first], place[ctx.first :]), ctx.needs_input_grad, strict=False)
        return *(gradients[0].index_select(0, part) if needed else None for part, needed in parts), None, None


def join(first: Memory, second: Memory) -> Memory:
    """Each sample's rows of the first, then its rows of the second."""
    if len(first.offsets) == 2:  # one sample
        return put_together(first, second, lambda *pair: torch.cat(pair))
    n, m = len(first.time), len(second.time)
    steps = torch.arange(n + m, device=first.time.device)
    after = second.offsets.index_select(0, samples_of(first.offsets, n))  # (n,): rows of the second before these
    before = first.offsets[1:].index_select(0, samples_of(second.offsets, m))  # (m,)
    place = torch.cat([steps[:n] + after, steps[:m] + before])  # (n + m,)
    order = torch.empty_like(place).index_copy_(0, place, steps)

    return put_together(first, second, lambda *pair: Interleave.apply(*pair, order, place))


def put_together(first: Memory, second: Memory, rows: Callable[[Tensor, Tensor], Tensor]) -> Memory:
    hidden, time, born = (rows(*pair) for pair in zip(first[:3], second[:3], strict=True))
    projected = None
    if first.projected is not None and second.projected is not None:
        projected = tuple(rows(*pair) for pair in zip(first.projected, second.projected, strict=True))
    return Memory(hidden, time, born, first.offsets + second.offsets, projected)


def select(memory: Memory, kept: Tensor, total: int | None = None) -> Memory:
    """Only the rows where kept (N,) is true; the others are gone for good. total: how many, where that is known."""
    if total == len(kept):
        return memory
    rows = (kept.nonzero() if total is None else kept.nonzero_static(size=total)).squeeze(-1)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])[memory.offsets]
    hidden, time, born = (part.index_select(0, rows) for part in memory[:3])
    projected = None if memory.projected is None else tuple(part.index_select(0, rows) for part in memory.projected)
    return Memory(hidden, time, born, offsets, projected)
