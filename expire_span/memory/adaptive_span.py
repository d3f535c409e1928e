"""Adaptive-Span (Sukhbaatar et al. 2019; section 5.1): every head learns one span z in [0, L].

The soft mask, with x = t - i and the + 1 of the authors' released code, and the loss:

    m_z(x) = clamp((R + z + 1 - x) / R, 0, 1) for x <= L, else 0
    loss   = alpha * mean of z over the heads

As in the released code, no head sees farther than L, even where its ramp would go on beyond L. A layer therefore holds
the last min(L, max z + R) memories.
"""

import math

import torch
from torch import Tensor, nn

from ..checks import check_integers
from .mechanism import Mechanism
from .packed import Memory


class AdaptiveSpan(Mechanism):
    """One learned parameter per head: its span z as a share of L.

    Args:
        num_heads: H, the number of attention heads.
        max_span: L, timesteps.
        ramp: R, timesteps.
        alpha: Weight of the span loss.
        init_span_ratio: Initial z as a share of L.
        num_positions: Distances with a relative position (None: all L).
    """

    def __init__(
        self,
        num_heads: int,
        max_span: int,
        ramp: float,
        alpha: float,
        init_span_ratio: float = 0.0,
        num_positions: int | None = None,
    ):
        super().__init__(max_span, ramp, max_span if num_positions is None else num_positions)
        check_integers(1, num_heads=num_heads)
        if not 0 <= init_span_ratio <= 1:
            raise ValueError(f"init_span_ratio must lie between 0 and 1, got {init_span_ratio}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a number that is not negative, got {alpha}")
        self.num_heads, self.max_distance = num_heads, max_span
        self.alpha, self.init_span_ratio = alpha, init_span_ratio
        self.span_ratio = nn.Parameter(torch.full((num_heads,), float(init_span_ratio)))  # (H,)

    def span(self, memory: Memory) -> Tensor:
        ratio: Tensor = self.span_ratio  # (H,)
        if self.training:
            with torch.no_grad():
                ratio.clamp_(0, 1)  # in place and outside of the graph: beyond [0, 1] a clamp would have no gradient
        else:
            ratio = ratio.clamp(0, 1)  # out of place: a change of the weights would invalidate the key/value cache
        return self.max_span * ratio[None, :] + 1  # (1, H)

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, batch_size: int, block_size: int) -> Tensor:
        return self.alpha * (span - 1).mean()
