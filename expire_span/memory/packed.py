"""Packed memory: every sample keeps its own survivors, back to back, without padding.

    sample 0        sample 1   sample 2
    h h h h h h h   h h        h h h h        hidden (N, d)
    0               7          9       13     offsets (B + 1,)

A layer looks at several, its memory and its block say, as parts of one: each as it is, one after another, so that a
sample has rows in every part. Offsets are (parts, B + 1) then. What survives of them becomes one memory again.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import together


class Memory(NamedTuple):
    """What a layer remembers: rows grouped by sample, the oldest first; or several of them, see `beside`."""

    hidden: Tensor  # (N, d)
    time: Tensor  # (N,) int64: the timestep at which each was made
    born: Tensor  # (N,) int64: the least distance at which it is seen: 1, or more for one pooled out of others
    offsets: Tensor  # (B + 1,) int64: sample b owns rows offsets[b] to offsets[b + 1]; or (parts, B + 1)
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


def beside(*memories: Memory) -> Memory:
    """All of them, one memory after another, each a part (or as many as it has): offsets (parts, B + 1)."""
    hidden, time, born = (torch.cat(parts) for parts in zip(*(memory[:3] for memory in memories), strict=True))
    known = [memory.projected for memory in memories if memory.projected is not None]
    projected = None
    if len(known) == len(memories):
        projected = tuple(torch.cat(parts) for parts in zip(*known, strict=True))
    firsts = accumulate((len(memory.time) for memory in memories[:-1]), initial=0)
    offsets = [torch.atleast_2d(memory.offsets) + first for memory, first in zip(memories, firsts, strict=True)]
    return Memory(hidden, time, born, torch.cat(offsets), projected)


def select(memory: Memory, kept: Tensor, total: int | None = None) -> Memory:
    """Only the rows where kept (N,) is true, each sample's together; the others are gone for good.

    total: how many, where that is known.
    """
    ends, order = memory.offsets, None
    if ends.shape[-1] == 2:  # one sample's are together as they are
        ends = ends.flatten()[:: ends.numel() - 1]
    elif ends.dim() > 1:
        order, ends = together(ends, len(kept))
        kept = kept.index_select(0, order)
    if order is None and total == len(kept):
        return memory._replace(offsets=ends)
    rows = (kept.nonzero() if total is None else kept.nonzero_static(size=total)).squeeze(-1)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])[ends]
    rows = rows if order is None else order.index_select(0, rows)
    hidden, time, born = (part.index_select(0, rows) for part in memory[:3])
    projected = None if memory.projected is None else tuple(part.index_select(0, rows) for part in memory.projected)
    return Memory(hidden, time, born, offsets, projected)


def join(*memories: Memory) -> Memory:
    """All in one: each sample's rows of the first memory, then its rows of the second, and so on."""
    entries = beside(*memories)
    return select(entries, torch.ones_like(entries.time, dtype=torch.bool))
