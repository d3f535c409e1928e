"""What a memory mechanism must answer; all the rest of a model is shared (section 5.1)."""

import torch
from torch import Tensor, nn

from .packed import Memory


class Mechanism(nn.Module):
    """How one layer treats its memories: how long each lives, and what that costs.

    max_span       L, timesteps
    ramp           R, timesteps over which a memory fades; 1 with whole spans is a hard edge
    positions      rows of the position table: how far back, in timesteps, a memory's distance is told
    rows           (P,) int64: the table's row for distance j + 1, where distances share some (None: row j)
    random_drop    hide all memories farther than l ~ U(0, L) in training, one l a batch (section 4)
    longest_block  timesteps: blocks of any length up to this can be processed
    """

    random_drop = False
    longest_block = 2**40

    def __init__(self, max_span: int, ramp: float, positions: int):
        super().__init__()
        if max_span < 1:
            raise ValueError(f"model.max_span must be at least 1 (timesteps), got {max_span}")
        if ramp <= 0:
            raise ValueError(f"model.ramp must be positive (timesteps), got {ramp}; a hard edge is model.ramp=1")
        if positions < 0:
            raise ValueError(f"model.positions must not be negative (timesteps), got {positions}; 0 tells no distance")
        self.max_span, self.ramp, self.positions = max_span, ramp, positions
        self.rows: Tensor | None
        self.register_buffer("rows", None, persistent=False)

    def pool(self, memory: Memory, time: Tensor) -> Memory | None:
        """Further memories, made out of those that there are, for the block of timesteps `time` (T,) and later ones."""
        return None

    def span(self, memory: Memory) -> Tensor:
        """(N or 1, H or 1): the span of each memory, for each head, in timesteps."""
        raise NotImplementedError

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, samples: int, block: int) -> Tensor:
        """What the spans cost. The block's queries see memory i at distances nearest[i] to farthest[i], both (N,)."""
        return span.new_zeros(())


def reached(age: Tensor, born: Tensor, sample: Tensor, block: int, reach: Tensor | None) -> tuple[Tensor, Tensor]:
    """The distances, (N,) nearest and (N,) farthest, at which the block's queries could see each memory.

    age, born, sample (N,); reach (B, T) grows by at most 1 a timestep, so that what is out of reach stays so.
    Where farthest < nearest no query can see it.
    """
    last = torch.full_like(age, block - 1)  # (N,): the last query that can see it
    if reach is not None:
        stride = 2**41  # keeps the samples apart, in one search for all of them
        steps = torch.arange(block, device=age.device)
        earliest = (steps - reach).clamp(min=1 - stride // 2)  # (B, T): the time, from the block's start, that is seen
        lines = torch.arange(len(reach), device=age.device)[:, None] * stride
        last = torch.searchsorted((earliest + lines).flatten(), sample * stride - age, right=True) - 1 - sample * block
    return torch.maximum(age, born), age + last


def memory_size(span: Tensor, ramp: float, nearest: Tensor, farthest: Tensor, queries: int) -> Tensor:
    """Average memory size: how many memories with m > 0 a query sees (section 5.1), mean over the heads.

    Distances d with d < span + ramp count. That is a closed form: no (queries, memories) tensor is made.
    """
    last = torch.minimum((span + ramp).ceil() - 1, farthest[:, None].to(span.dtype))  # (N, H)
    return (last - nearest[:, None] + 1).clamp(min=0).sum(0).mean() / queries
