"""Adaptive-Span (Sukhbaatar et al. 2019): every head learns one span z in [0, L].

    m_z(x) = clamp((R + z + 1 - x) / R, 0, 1)        x = t - i; the + 1 is the released code's
    loss   = alpha * mean over heads of z
"""

import torch
from torch import Tensor, nn

from .mechanism import Mechanism
from .packed import Memory


class AdaptiveSpan(Mechanism):
    """One parameter a head: z as a ratio of L.

    heads      H
    max_span   L, timesteps; ramp: R, timesteps
    alpha      weight of the span loss
    init       z at the start, as a share of L
    positions  distances that are told (None: all L)
    """

    def __init__(
        self,
        heads: int,
        max_span: int,
        ramp: float,
        alpha: float,
        init: float = 0.0,
        positions: int | None = None,
    ):
        super().__init__(max_span, ramp, positions=max_span if positions is None else positions)
        if not 0 <= init <= 1:
            raise ValueError(f"model.init must lie between 0 and 1 (share of model.max_span), got {init}")
        if alpha < 0:
            raise ValueError(f"model.alpha must not be negative, got {alpha}")
        self.alpha = alpha
        self.ratio = nn.Parameter(torch.full((heads,), float(init)))  # (H,)

    def span(self, memory: Memory) -> Tensor:
        ratio: Tensor = self.ratio  # (H,)
        if self.training:
            with torch.no_grad():
                ratio.clamp_(0, 1)  # before use, not in the graph: outside of [0, 1] a clamp has no gradient
        else:
            ratio = ratio.clamp(0, 1)  # a weight that changes would have all memories projected anew
        return self.max_span * ratio[None, :] + 1  # (1, H)

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, samples: int, block: int) -> Tensor:
        return self.alpha * (span - 1).mean()
