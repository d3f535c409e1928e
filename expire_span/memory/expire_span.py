"""Expire-Span (sections 4.1 and 4.2): the span of every memory is predicted from its hidden state.

The span, the soft mask that attention applies, and the loss, which is averaged over the batch:

    e_i  = L sigmoid(w . h_i + b)
    m_ti = clamp(1 + (e_i - (t - i)) / R, 0, 1)
    loss = alpha / (R T) * sum of e_i - (t - i) over all i and the T queries t of the block with 0 < m_ti < 1

L limits e_i, not the number of memories: one with e_i near L fades until L + R, as in the paper and the released code.
A layer holds at most L + R - 1 memories of each sample.
"""

import math

import torch
from torch import Tensor, nn

from ..checks import check_integers
from .mechanism import Mechanism
from .packed import Memory


class ExpireSpan(Mechanism):
    """One w and b per layer, shared by the heads.

    Args:
        hidden_size: d.
        max_span: L, timesteps.
        ramp: R, timesteps.
        alpha: Weight of the span loss.
        num_positions: Distances with a relative position: the size of a training block in section 4.2.
        init_span_ratio: Initial e as a share of L. It determines b; w starts at 0.
        pre_div: Divides h before w, so that w learns more slowly.
        random_drop: In training, hide memories farther than l ~ U(0, L) (section 4.2).
    """

    def __init__(
        self,
        hidden_size: int,
        max_span: int,
        ramp: float,
        alpha: float,
        num_positions: int,
        init_span_ratio: float = 0.1,
        pre_div: float = 1.0,
        random_drop: bool = False,
    ):
        super().__init__(max_span, ramp, num_positions)
        check_integers(1, hidden_size=hidden_size)
        if not 0 < init_span_ratio < 1:
            raise ValueError(f"init_span_ratio must lie strictly between 0 and 1, got {init_span_ratio}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a number that is not negative, got {alpha}")
        if not 0 < pre_div < math.inf:
            raise ValueError(f"pre_div must be positive, got {pre_div}")
        self.hidden_size, self.alpha, self.init_span_ratio = hidden_size, alpha, init_span_ratio
        self.pre_div, self.random_drop = pre_div, random_drop
        self.weight = nn.Parameter(torch.zeros(hidden_size))  # (d,)
        self.bias = nn.Parameter(torch.tensor(math.log(init_span_ratio / (1 - init_span_ratio))))

    def span(self, memory: Memory) -> Tensor:
        with torch.autocast(memory.hidden.device.type, enabled=False):  # bf16 could not resolve a timestep in 64k
            logit = memory.hidden.to(self.weight.dtype) @ (self.weight / self.pre_div) + self.bias  # (N,)
        return self.max_span * torch.sigmoid(logit)[:, None]  # (N, 1)

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, batch_size: int, block_size: int) -> Tensor:
        e = span.squeeze(-1)  # (N,)
        with torch.no_grad():  # each memory is on the ramp, e < distance < e + R, at the distances first, ..., last
            first = torch.maximum(e.floor() + 1, nearest.to(e.dtype))  # (N,)
            last = torch.minimum((e + self.ramp).ceil() - 1, farthest.to(e.dtype))  # (N,)
            count = (last - first + 1).clamp(min=0)  # (N,)
        remaining = count * e - count * (first + last) / 2  # (N,): the sum of e - distance over them
        return self.alpha / (self.ramp * block_size * batch_size) * remaining.sum()
