"""Packed memory: the surviving memories of each sample, back to back, without padding.

    sample 0        sample 1   sample 2
    h h h h h h h   h h        h h h h        hidden (N, d)
    0               7          9       13     offsets (B + 1,)

A layer attends to several of these at once, such as its memory and the current block. They are then concatenated as
parts, one after another, so that each sample has rows in every part, and offsets are (parts, B + 1). What survives of
them becomes one packed memory again.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.packed_layout import interleave_by_sample


class Memory(NamedTuple):
    """A layer's memory: rows grouped by sample, oldest first; or several of them as parts, see `concatenate_parts`."""

    hidden: Tensor  # (N, d)
    time: Tensor  # (N,) int64: the timestep of each hidden state
    min_distance: Tensor  # (N,) int64: the smallest distance at which it is visible: 1, or more for a pooled state
    offsets: Tensor  # (B + 1,) int64: sample b owns rows offsets[b] to offsets[b + 1]; or (parts, B + 1)
    kv: tuple[Tensor, ...] | None = None  # keys and values (N, H, D) and spans (N, H or 1), if computed
    max_age: int | None = None  # timesteps from the oldest row to the next block's first query, if the host knows it
    log_decay: Tensor | None = None  # (N, H): the sum of the log gates since, added to its scores; None: no gates


def carried_rows(memory: Memory) -> list[Tensor]:
    """What is kept of each row from block to block, (N, ...), apart from what can be computed again."""
    return [*memory[:3], *([] if memory.log_decay is None else [memory.log_decay])]


def map_rows(function: Callable[..., Tensor], *memories: Memory) -> Memory:
    """Apply a function to what memories have of each row, (N, ...) each; to `kv` and `log_decay` if all have them.

    Returns:
        The results as a memory, with the offsets of the first one, and an unknown `max_age`.
    """
    hidden, time, min_distance = (function(*rows) for rows in zip(*(memory[:3] for memory in memories), strict=True))
    caches = [memory.kv for memory in memories if memory.kv is not None]
    log_decays = [memory.log_decay for memory in memories if memory.log_decay is not None]
    kv, log_decay = None, None
    if len(caches) == len(memories):
        kv = tuple(function(*rows) for rows in zip(*caches, strict=True))
    if len(log_decays) == len(memories):
        log_decay = function(*log_decays)
    return Memory(hidden, time, min_distance, memories[0].offsets, kv, None, log_decay)


def empty(batch_size: int, hidden_size: int, like: Tensor) -> Memory:
    """Make a memory without rows, with the device and dtype of `like`."""
    no_rows = torch.zeros(0, dtype=torch.long, device=like.device)
    return Memory(like.new_zeros(0, hidden_size), no_rows, no_rows, no_rows.new_zeros(batch_size + 1), max_age=0)


def with_max_age(memory: Memory, step: Tensor) -> Memory:
    """Return the memory with its `max_age` at timestep `step`. Unless it is known, the device has to be waited for."""
    if memory.max_age is not None:
        return memory
    return memory._replace(max_age=int((step - memory.time).max()) if len(memory.time) else 0)


def from_dense(hidden: Tensor, time: Tensor, min_distance: int = 1) -> Memory:
    """Make a memory with the same number of rows for every sample: hidden (B, M, d) at the timesteps time (M,)."""
    batch_size, num_rows, _ = hidden.shape
    offsets = torch.arange(batch_size + 1, device=time.device) * num_rows
    min_distances = time.new_full((batch_size * num_rows,), min_distance)
    return Memory(hidden.flatten(0, 1), time.repeat(batch_size), min_distances, offsets)


def concatenate_parts(*memories: Memory) -> Memory:
    """Put memories one after another as parts, with offsets (parts, B + 1); `kv` and `log_decay` if all have them."""
    first_rows = accumulate((len(memory.time) for memory in memories[:-1]), initial=0)
    offsets = [torch.atleast_2d(memory.offsets) + first for memory, first in zip(memories, first_rows, strict=True)]
    return map_rows(lambda *rows: torch.cat(rows), *memories)._replace(offsets=torch.cat(offsets))


def counts_and_max_ages(memories: Sequence[Memory], keep: Sequence[Tensor], next_step: Tensor) -> Tensor:
    """Find what `keep_rows` will leave of each layer, in one tensor, so that the device is waited for only once.

    Args:
        memories: One for each layer.
        keep: (N,) bool for each layer, as `keep_rows` takes it.
        next_step: Scalar, the timestep of the next block's first query.

    Returns:
        How many rows are kept, and the `max_age` of the oldest of them, as a tensor (2, layers).
    """
    ages = [((next_step - memory.time) * mask).amax() for memory, mask in zip(memories, keep, strict=True)]
    return torch.stack([torch.stack([mask.sum() for mask in keep]), torch.stack(ages)])


def keep_rows(memory: Memory, keep: Tensor, num_kept: int | None = None) -> Memory:
    """Keep some rows, grouped by sample, and delete all others for good.

    Args:
        memory: N rows, in one part or in several.
        keep: (N,) bool.
        num_kept: The number of rows to keep, if it is known; otherwise the device has to be waited for.
    """
    offsets, order = memory.offsets, None
    if offsets.shape[-1] == 2:  # a single sample, whose rows are together already
        offsets = offsets.flatten()[:: offsets.numel() - 1]
    elif offsets.dim() > 1:
        order, offsets = interleave_by_sample(offsets, len(keep))
        keep = keep.index_select(0, order)
    if order is None and num_kept == len(keep):
        return memory._replace(offsets=offsets)
    rows = (keep.nonzero() if num_kept is None else keep.nonzero_static(size=num_kept)).squeeze(-1)
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)])[offsets]
    rows = rows if order is None else order.index_select(0, rows)
    return map_rows(lambda tensor: tensor.index_select(0, rows), memory)._replace(offsets=offsets)


def concatenate(*memories: Memory) -> Memory:
    """Join memories into one: each sample's rows of the first memory, then its rows of the second, and so on."""
    parts = concatenate_parts(*memories)
    return keep_rows(parts, torch.ones_like(parts.time, dtype=torch.bool))
