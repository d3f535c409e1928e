"""Compressive Transformer (Rae et al. 2020), mean pooling: the last L memories, and C pooled out of c older ones each.

    a memory          span = L                 seen at distances 1 to L
    a pooled one      span = L + c (C + 1)     seen at distances L + 1 to L + c (C + 1); its distance is that of the
                                               oldest state in it, plus 1
"""

import torch
from torch import Tensor

from ..attention import NEVER, samples_of
from .mechanism import Mechanism
from .packed import Memory, dense


class Compressive(Mechanism):
    """max_span: L, timesteps; compressed: C, pooled memories; rate: c, states pooled into one. All distances are told.

    Blocks may have any length, which changes no output, but not more than the L timesteps that are pooled only later.
    Where episodes are told apart by their reach, no group is seen that holds an earlier episode's states; nor is one
    that begins with its episode, as its distance is one more than that of its oldest state.
    """

    def __init__(self, max_span: int, compressed: int, rate: int = 4):
        if compressed < 1 or rate < 1:
            raise ValueError(f"model.compressed and model.rate must be at least 1, got {compressed} and {rate}")
        super().__init__(max_span, ramp=1, positions=max_span + compressed + 1)
        self.compressed, self.rate, self.longest_block = compressed, rate, max(1, max_span - rate + 1)
        pooled = max_span + torch.arange(compressed + 1).repeat_interleave(rate)  # a slot's row tells c distances
        self.rows = torch.cat([torch.arange(max_span), pooled])

    def pool(self, memory: Memory, time: Tensor) -> Memory:
        """Of what is about to leave: the groups of c whose oldest state leaves the last L during this block."""
        samples, block, size = memory.offsets.shape[-1] - 1, len(time), memory.hidden.shape[1]
        if block > self.max_span or (block % self.rate and block + self.rate - 1 > self.max_span):
            raise ValueError(
                f"model.max_span={self.max_span} is too short for blocks of {block} timesteps, since what is pooled "
                f"must be older than the block; use model.max_span >= {block + self.rate - 1} or shorter blocks"
            )
        groups = -(-block // self.rate)  # at most
        oldest = (time[0] + self.rate - 1) // self.rate * self.rate - self.max_span  # the first group's oldest state
        group = (memory.time - oldest).div(self.rate, rounding_mode="floor")  # (N,)
        member = (memory.born == 1) & (group >= 0) & (group < groups)  # (N,)
        place = samples_of(memory.offsets, len(group)) * groups + group.clamp(0, groups - 1)  # (N,)
        total = memory.hidden.new_zeros(samples * groups, size).index_add(0, place, memory.hidden * member[:, None])
        count = place.new_zeros(samples * groups).index_add(0, place, member.long())  # (B groups,)

        starts = oldest + torch.arange(groups, device=time.device) * self.rate  # (groups,)
        whole = (count == self.rate) & (starts < time[0] - self.max_span + block).repeat(samples)
        pooled = dense((total / self.rate).unflatten(0, (samples, groups)), starts - 1, born=self.max_span + 1)
        return pooled._replace(born=pooled.born.where(whole, NEVER))  # not whole: never seen, and deleted with the rest

    def span(self, memory: Memory) -> Tensor:
        pooled = (memory.born > 1)[:, None]  # (N, 1)
        return (self.max_span + pooled * self.rate * (self.compressed + 1)).to(torch.get_default_dtype())
