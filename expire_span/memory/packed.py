"""Packed memory: every sample keeps its own survivors, back to back, without padding.

    sample 0        sample 1   sample 2
    h h h h h h h   h h        h h h h        hidden (N, d)
    0               7          9       13     offsets (B + 1,)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import samples_of


class Memory(NamedTuple):
    """What a layer remembers: rows grouped by sample, the oldest first."""

    hidden: Tensor  # (N, d)
    time: Tensor  # (N,) int64: the timestep at which each was made
    born: Tensor  # (N,) int64: the least distance at which it is seen: 1, or more for one pooled out of others
    offsets: Tensor  # (B + 1,) int64: sample b owns rows offsets[b] to offsets[b + 1]


def empty(samples: int, hidden_size: int, like: Tensor) -> Memory:
    """No memories, with the device and dtype of `like`."""
    none = torch.zeros(0, dtype=torch.long, device=like.device)
    return Memory(like.new_zeros(0, hidden_size), none, none, none.new_zeros(samples + 1))


def dense(hidden: Tensor, time: Tensor, born: int = 1) -> Memory:
    """The same number for every sample: hidden (B, M, d), made at time (M,)."""
    samples, each, _ = hidden.shape
    offsets = torch.arange(samples + 1, device=time.device) * each
    return Memory(hidden.flatten(0, 1), time.repeat(samples), time.new_full((samples * each,), born), offsets)


def join(first: Memory, second: Memory) -> Memory:
    """Each sample's rows of the first, then its rows of the second."""
    total, more = len(first.time), len(second.time)
    place_first = torch.arange(total, device=first.time.device) + second.offsets[samples_of(first.offsets, total)]
    place_second = torch.arange(more, device=first.time.device) + first.offsets[1:][samples_of(second.offsets, more)]
    place = torch.cat([place_first, place_second])  # (N,)
    order = torch.empty_like(place).index_copy(0, place, torch.arange(total + more, device=place.device))
    hidden, time, born = (torch.cat(pair)[order] for pair in zip(first[:3], second[:3], strict=True))
    return Memory(hidden, time, born, first.offsets + second.offsets)


def select(memory: Memory, kept: Tensor) -> Memory:
    """Only the rows where kept (N,) is true; the others are gone for good."""
    rows = kept.nonzero().squeeze(-1)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.cumsum(0)])[memory.offsets]
    return Memory(memory.hidden[rows], memory.time[rows], memory.born[rows], offsets)
