"""A layer's memories in a padded cache that is written in place, one column a timestep.

               timestep   0   1   2   3   4
    stream 0              x       x   x   x        x: alive
    stream 1                          x   x        blank: dead, its min_distance is NEVER

All streams write the same column. A dead memory stays where it is until the cache is full: then the living ones move to
the left, and the cache grows if they fill more than half of it.
"""

import torch
from torch import Tensor

from ..kernels.packed_layout import NEVER, sample_index
from .packed import Memory, keep_rows

COLUMNS = 64  # the number of columns is a multiple of this


class Cache:
    """The memories of B streams, in C columns.

    Args:
        memory: Packed memories, with their keys, values and spans; they are copied.

    Attributes:
        hidden, span, time, min_distance: (B, C, d), (B, C, h), (B, C), (B, C): as in `Memory`.
        key_value: (B, C, 2, H, D).
        log_decay: (B, C, H), or None, as in `Memory`.
        columns: How many columns are in use.
    """

    def __init__(self, memory: Memory):
        self.load(memory)

    def load(self, memory: Memory) -> None:
        """Begin with these memories, at the left, and with at least as many free columns."""
        assert memory.kv is not None
        lengths = memory.offsets.diff()  # (B,)
        self.num_streams, self.columns = len(lengths), int(lengths.max())
        capacity = -(-(2 * self.columns + 1) // COLUMNS) * COLUMNS
        sample = sample_index(memory.offsets, len(memory.time))  # (N,)
        column = torch.arange(len(sample), device=sample.device) - memory.offsets[sample]  # (N,)

        def padded(rows: Tensor, fill: int = 0) -> Tensor:
            cache = rows.new_full((self.num_streams * capacity, *rows.shape[1:]), fill)
            cache.index_copy_(0, sample * capacity + column, rows)
            return cache.unflatten(0, (self.num_streams, capacity))  # (B, C, ...)

        key, value, span = memory.kv
        self.hidden, self.key_value = padded(memory.hidden), padded(torch.stack([key, value], 1))
        self.span = padded(span.to(memory.hidden.dtype))
        self.time, self.min_distance = padded(memory.time), padded(memory.min_distance, NEVER)
        self.log_decay = None if memory.log_decay is None else padded(memory.log_decay)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.hidden, self.key_value, self.span, self.time, self.min_distance

    def make_room(self) -> None:
        """Make sure that there is a free column."""
        if self.columns == self.time.shape[1]:
            self.load(self.packed())

    def append(
        self,
        hidden: Tensor,
        key_value: Tensor,
        span: Tensor,
        time: Tensor,
        min_distance: Tensor,
        log_decay: Tensor | None = None,
    ) -> None:
        """Write a memory of each stream into the next column: (B, d), (B, 2, H, D), (B, h), (B,), (B,), (B, H)."""
        self.make_room()
        for cache, rows in zip(self.tensors(), (hidden, key_value, span, time, min_distance), strict=True):
            cache[:, self.columns] = rows
        if self.log_decay is not None and log_decay is not None:
            self.log_decay[:, self.columns] = log_decay
        self.columns += 1

    def rows(self) -> Memory:
        """Return all columns in use as a packed memory, in which rows with the min_distance NEVER are dead."""
        hidden, key_value, span, time, min_distance = (
            tensor[:, : self.columns].flatten(0, 1) for tensor in self.tensors()
        )
        offsets = torch.arange(self.num_streams + 1, device=time.device) * self.columns
        log_decay = None if self.log_decay is None else self.log_decay[:, : self.columns].flatten(0, 1)
        return Memory(hidden, time, min_distance, offsets, (*key_value.unbind(1), span), log_decay=log_decay)

    def packed(self) -> Memory:
        """Return a copy of the living memories."""
        rows = self.rows()
        return keep_rows(rows, rows.min_distance < NEVER)
