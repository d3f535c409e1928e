"""Transformer-XL (Dai et al. 2019; section 5.1): every memory lives for L timesteps.

The span is L, and a ramp of 1 makes the soft mask a hard edge:

    m_ti = 1 if t - i <= L else 0
"""

import torch
from torch import Tensor

from .mechanism import Mechanism
from .packed import Memory


class TransXL(Mechanism):
    """The last L hidden states.

    Args:
        max_span: L, timesteps.
        num_positions: Distances with a relative position (None: all L).
    """

    def __init__(self, max_span: int, num_positions: int | None = None):
        super().__init__(max_span, ramp=1, num_positions=max_span if num_positions is None else num_positions)

    def span(self, memory: Memory) -> Tensor:
        return torch.full((1, 1), float(self.max_span), device=memory.hidden.device)
