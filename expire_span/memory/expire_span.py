"""Expire-Span (section 4): every memory's span is predicted from its hidden state.

    e_i = L sigmoid(w . h_i + b)        m_ti = clamp(1 + (e_i - (t - i)) / R, 0, 1)
    loss = alpha / (R T) * sum of e_i - (t - i) over the queries t of the block with 0 < m_ti < 1
"""

import math

import torch
from torch import Tensor, nn

from .mechanism import Mechanism
from .packed import Memory


class ExpireSpan(Mechanism):
    """One w and b a layer, shared by the heads.

    hidden_size  d
    max_span     L, timesteps; ramp: R, timesteps
    alpha        weight of the span loss
    init         e at the start, as a share of L: sets b, w starts at 0
    pre_div      h is divided by it before w, which slows the predictor down
    positions    distances that are told: a training block's
    random_drop  regularise: in training, hide memories farther than l ~ U(0, L)
    """

    def __init__(
        self,
        hidden_size: int,
        max_span: int,
        ramp: float,
        alpha: float,
        positions: int,
        init: float = 0.1,
        pre_div: float = 1.0,
        random_drop: bool = False,
    ):
        super().__init__(max_span, ramp, positions)
        if not 0 < init < 1:
            raise ValueError(f"model.init must lie between 0 and 1 (share of model.max_span), got {init}")
        if alpha < 0:
            raise ValueError(f"model.alpha must not be negative, got {alpha}")
        self.alpha, self.pre_div, self.random_drop = alpha, pre_div, random_drop
        self.weight = nn.Parameter(torch.zeros(hidden_size))  # (d,)
        self.bias = nn.Parameter(torch.tensor(math.log(init / (1 - init))))

    def span(self, memory: Memory) -> Tensor:
        with torch.autocast(memory.hidden.device.type, enabled=False):  # a timestep in 64k is finer than bf16
            logit = memory.hidden.to(self.weight.dtype) @ (self.weight / self.pre_div) + self.bias  # (N,)
        return self.max_span * torch.sigmoid(logit)[:, None]  # (N, 1)

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, samples: int, block: int) -> Tensor:
        e = span.squeeze(-1)  # (N,)
        with torch.no_grad():  # the whole distances on the ramp, e < t - i < e + R, are first to last
            first = torch.maximum(e.floor() + 1, nearest.to(e.dtype))
            last = torch.minimum((e + self.ramp).ceil() - 1, farthest.to(e.dtype))
            count = (last - first + 1).clamp(min=0)  # (N,)
        remaining = count * e - count * (first + last) / 2  # (N,): the sum of e - (t - i) over them
        return self.alpha / (self.ramp * block * samples) * remaining.sum()
