"""Packed memory: every sample keeps its own survivors, back to back, without padding.

    sample 0        sample 1   sample 2
    h h h h h h h   h h        h h h h        hidden (N, d)
    0               7          9       13     offsets (B + 1,)
"""

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


class Order(NamedTuple):
    """How the rows of some memories, one memory after another, come to stand with each sample's together."""

    order: Tensor  # (N,): the row that stands here
    places: tuple[Tensor, ...]  # (n,) each: where the rows of each memory stand


def order_of(*memories: Memory) -> Order:
    """Each sample's rows of the first memory, then its rows of the second, and so on."""
    ends = torch.stack([memory.offsets for memory in memories])  # (memories, B + 1)
    steps = torch.arange(sum(len(memory.time) for memory in memories), device=ends.device)
    places = []
    for number, memory in enumerate(memories):
        others = ends[:number, 1:].sum(0) + ends[number + 1 :, :-1].sum(0)  # (B,): of their rows, those before b's here
        rows = len(memory.time)
        places.append(steps[:rows] + others.index_select(0, samples_of(memory.offsets, rows)))
    return Order(torch.empty_like(steps).index_copy_(0, torch.cat(places), steps), tuple(places))


class Interleave(torch.autograd.Function):
    """Parts (n, ...), as many as places, as one (N, ...) in an order; a gradient is only looked up."""

    @staticmethod
    def forward(ctx: Any, order: Tensor, *places_and_parts: Tensor) -> Tensor:
        half = len(places_and_parts) // 2
        ctx.save_for_backward(*places_and_parts[:half])
        return torch.cat(places_and_parts[half:]).index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        places = ctx.saved_tensors
        wanted = zip(places, ctx.needs_input_grad[1 + len(places) :], strict=True)
        found = [gradients[0].index_select(0, rows) if needed else None for rows, needed in wanted]
        return None, *[None] * len(places), *found


def interleaved(order: Order | None, *parts: Tensor) -> Tensor:
    """(n, ...) each, as one (N, ...); None: one after another."""
    return torch.cat(parts) if order is None else Interleave.apply(order.order, *order.places, *parts)


def join(*memories: Memory, order: Order | None = None) -> Memory:
    """All in one, in the `order_of` them, which need not be given."""
    if order is None and len(memories[0].offsets) > 2:  # one sample is in order as it is
        order = order_of(*memories)
    hidden, time, born = (
        interleaved(order, *parts) for parts in zip(*(memory[:3] for memory in memories), strict=True)
    )
    known = [memory.projected for memory in memories if memory.projected is not None]
    projected = None
    if len(known) == len(memories):
        projected = tuple(interleaved(order, *parts) for parts in zip(*known, strict=True))
    return Memory(hidden, time, born, torch.stack([memory.offsets for memory in memories]).sum(0), projected)


def select(memory: Memory, kept: Tensor, total: int | None = None) -> Memory:
    """Only the rows where kept (N,) is true; the others are gone for good. total: how many, where that is known."""
    if total == len(kept):
        return memory
    rows = (kept.nonzero() if total is None else kept.nonzero_static(size=total)).squeeze(-1)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])[memory.offsets]
    hidden, time, born = (part.index_select(0, rows) for part in memory[:3])
    projected = None if memory.projected is None else tuple(part.index_select(0, rows) for part in memory.projected)
    return Memory(hidden, time, born, offsets, projected)
