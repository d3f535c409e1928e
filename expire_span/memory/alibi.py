"""ALiBi (Press et al. 2022, arXiv 2108.12409): scores fall with the distance, at a fixed rate for each head.

    a_ti    = softmax over i of  q_t . k_i / sqrt(D) - slope_h (t - i)       over the last L timesteps
    slope_h = 2^(-8 h / H) for the heads h = 1, ..., H

These are the slopes of the paper where H is a power of two.
"""

import torch
from torch import Tensor

from ..checks import check_integers
from .mechanism import Mechanism
from .packed import Memory


class Alibi(Mechanism):
    """The last L hidden states, of which older ones get less weight.

    Args:
        num_heads: H, the number of attention heads.
        max_span: L, timesteps.
        num_positions: Distances with a relative position; the paper has none.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, max_span: int, num_positions: int = 0):
        super().__init__(max_span, ramp=1, num_positions=num_positions)
        check_integers(1, num_heads=num_heads)
        self.num_heads = num_heads
        slopes = [2.0 ** (-8 * head / num_heads) for head in range(1, num_heads + 1)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)  # (H,)

    def span(self, memory: Memory) -> Tensor:
        return torch.full((1, 1), float(self.max_span), device=memory.hidden.device)

    def score_bias(self, age: Tensor) -> Tensor:
        return -self.slopes * age[:, None]  # (N, H): the query's own distance to the block's start cancels
