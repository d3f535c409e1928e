"""Compressive Transformer (Rae et al. 2020; section 5.1) with mean pooling: L states, and C means of c older ones each.

Both kinds have a fixed span. The distance of a pooled state is that of the oldest state in it, plus 1:

    hidden state    span = L                visible at distances 1, ..., L
    pooled state    span = L + c (C + 1)    visible at distances L + 1, ..., L + c (C + 1)
"""

import torch
from torch import Tensor

from ..checks import check_integers
from ..kernels.packed_layout import NEVER, sample_index
from .mechanism import Mechanism
from .packed import Memory, from_dense


class Compressive(Mechanism):
    """The last L hidden states and C pooled ones. All distances have a relative position.

    The block size, up to L - c + 1 or any multiple of c up to L, does not change the output. Where `reach` separates
    episodes, a pooled state is invisible if it contains a state of an earlier episode, or if it begins with the first
    state of the current one, because its distance is one more than that of its oldest state.

    Args:
        max_span: L, timesteps.
        compressed_size: C, pooled states.
        compression_rate: c, hidden states per pooled state.
    """

    def __init__(self, max_span: int, compressed_size: int, compression_rate: int = 4):
        check_integers(1, max_span=max_span, compressed_size=compressed_size, compression_rate=compression_rate)
        super().__init__(max_span, ramp=1, num_positions=max_span + compressed_size + 1)
        self.compressed_size, self.compression_rate = compressed_size, compression_rate
        self.pool_interval = compression_rate
        self.max_block_size = max(1, max_span - compression_rate + 1)
        pooled_rows = max_span + torch.arange(compressed_size + 1).repeat_interleave(compression_rate)
        self.rows = torch.cat([torch.arange(max_span), pooled_rows])  # the c distances of a pooled state share a row

    @property
    def max_reach(self) -> int:
        return self.max_span + self.compression_rate * (self.compressed_size + 1) - 1  # of the oldest state in a mean

    @property
    def max_memories(self) -> int:
        return self.max_span + self.compressed_size

    def check_block_size(self, block_size: int) -> None:
        rate = self.compression_rate
        if block_size > self.max_span or (block_size % rate and block_size + rate - 1 > self.max_span):
            raise ValueError(
                f"max_span={self.max_span} is too short for blocks of {block_size} timesteps, since only states older "
                f"than the block are pooled; use max_span >= {block_size + rate - 1} or shorter blocks"
            )

    def pool(self, memory: Memory, time: Tensor) -> Memory:
        """Pool the groups of c states whose oldest state leaves the last L timesteps during this block."""
        batch_size, block_size, rate = memory.offsets.shape[-1] - 1, len(time), self.compression_rate
        self.check_block_size(block_size)
        num_groups = -(-block_size // rate)  # an upper bound, which does not depend on `time`
        first_oldest = (time[0] + rate - 1) // rate * rate - self.max_span
        oldest = first_oldest + torch.arange(num_groups, device=time.device) * rate  # (num_groups,): timesteps
        group = (memory.time - first_oldest).div(rate, rounding_mode="floor")  # (N,)
        is_member = (memory.min_distance == 1) & (group >= 0) & (group < num_groups)  # (N,)
        slot = sample_index(memory.offsets, len(group)) * num_groups + group.clamp(0, num_groups - 1)  # (N,)
        sums = memory.hidden.new_zeros(batch_size * num_groups, memory.hidden.shape[1])
        sums = sums.index_add(0, slot, memory.hidden * is_member[:, None])  # (B num_groups, d)
        count = slot.new_zeros(batch_size * num_groups).index_add(0, slot, is_member.long())  # (B num_groups,)

        leaves_now = (oldest < time[0] - self.max_span + block_size).repeat(batch_size)  # (B num_groups,)
        means = (sums / rate).unflatten(0, (batch_size, num_groups))  # (B, num_groups, d)
        pooled = from_dense(means, oldest - 1, min_distance=self.max_span + 1)
        is_complete = (count == rate) & leaves_now
        return pooled._replace(min_distance=pooled.min_distance.where(is_complete, NEVER))  # the others stay invisible

    def span(self, memory: Memory) -> Tensor:
        is_pooled = (memory.min_distance > 1)[:, None]  # (N, 1)
        extra = is_pooled * self.compression_rate * (self.compressed_size + 1)
        return (self.max_span + extra).to(torch.get_default_dtype())
