"""Transformer-XL (Dai et al. 2019): every memory lives for L timesteps.

    span = L        ramp = 1, a hard edge        m_ti = 1 for t - i <= L, else 0
"""

import torch
from torch import Tensor

from .mechanism import Mechanism
from .packed import Memory


class TransXL(Mechanism):
    """max_span: L, timesteps. positions: distances that are told (None: all L)."""

    def __init__(self, max_span: int, positions: int | None = None):
        super().__init__(max_span, ramp=1, positions=max_span if positions is None else positions)

    def span(self, memory: Memory) -> Tensor:
        return torch.full((1, 1), float(self.max_span), device=memory.hidden.device)
