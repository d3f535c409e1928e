"""Mechanisms that hold a fixed number of memories, and evict those of the lowest priority."""

import torch
from torch import Tensor

from ..checks import check_integers
from ..kernels.packed_layout import sample_index
from .mechanism import Mass, Mechanism
from .packed import Memory


class Eviction(Mechanism):
    """The `num_kept` memories of each stream with the highest `priority`, out of the last L.

    They are chosen after each block, so that a query sees up to a block more. Of equal ones the newest stay.

    Args:
        max_span: L, timesteps.
        num_kept: Memories of each stream.
        num_positions: Distances with a relative position (None: all L).
    """

    def __init__(self, max_span: int, num_kept: int, num_positions: int | None = None):
        super().__init__(max_span, ramp=1, num_positions=max_span if num_positions is None else num_positions)
        check_integers(1, num_kept=num_kept)
        self.num_kept = num_kept

    @property
    def max_memories(self) -> int:
        return min(self.num_kept, self.max_span)

    def span(self, memory: Memory) -> Tensor:
        return torch.full((1, 1), float(self.max_span), device=memory.hidden.device)

    def priority(self, memory: Memory, age: Tensor, mass: Mass) -> Tensor:
        """Return what is kept first, (N,), higher than what is evicted; arguments as those of `keep`."""
        raise NotImplementedError

    def keep(self, memory: Memory, age: Tensor, alive: Tensor, mass: Mass) -> Tensor:
        priority = self.priority(memory, age, mass).masked_fill(~alive, -torch.inf)  # (N,)
        return alive & is_top_of_sample(priority, sample_index(memory.offsets, len(age)), self.num_kept)


def is_top_of_sample(priority: Tensor, sample: Tensor, number: int) -> Tensor:
    """Return which rows are among the `number` highest of their sample, (N,) bool; of equal ones the last."""
    order = len(priority) - 1 - priority.flip(0).argsort(descending=True, stable=True)
    order = order[sample[order].argsort(stable=True)]  # grouped by sample, highest first
    group = sample[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(group, group)
    return torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, rank < number)
