"""Forgetting Transformer (Lin et al. 2025, arXiv 2503.02130): every new hidden state takes weight from all memories.

Each head h of a layer has a forget gate f, and a memory's score falls by the log gates of all later states:

    f_t   = sigmoid(w_h . h_t + b_h)
    a_ti  = softmax over i of  score_ti + sum of log f_j over i < j <= t

A memory is deleted once its gates have multiplied to less than a threshold in every head (Lin et al. 2025, arXiv
2504.06949, whose bound is on a memory's weight: that is at most threshold times e to the range of the scores).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..checks import check_integers
from .mechanism import Mass, Mechanism
from .packed import Memory


class ForgetGates(nn.Module):
    """f = sigmoid(w . h + b), one w and b for each head.

    Args:
        hidden_size: d.
        num_heads: H.
        half_life: Timesteps in which the gates multiply to a half, initially: the longest of all heads. The others'
            are shorter, down to 1/16 of it, evenly on a logarithmic scale, so that heads differ.
    """

    def __init__(self, hidden_size: int, num_heads: int, half_life: float):
        super().__init__()
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life must be a positive number of timesteps, got {half_life}")
        half_lives = half_life * torch.logspace(0, -4, num_heads, base=2, dtype=torch.float64)  # (H,)
        log_f = -math.log(2) / half_lives
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size))  # (H, d)
        self.bias = nn.Parameter((log_f - torch.log(-torch.expm1(log_f))).float())  # (H,), the logit of f

    def forward(self, hidden: Tensor) -> Tensor:
        """Return log f (N, H) of hidden states (N, d)."""
        with torch.autocast(hidden.device.type, enabled=False):  # sums of thousands need more than bf16
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return logsigmoid(hidden.to(dtype) @ self.weight.T.to(dtype) + self.bias.to(dtype))


class Fox(Mechanism):
    """Forget gates over the last L hidden states.

    Args:
        hidden_size: d.
        num_heads: H, the number of attention heads.
        max_span: L, timesteps: what is older is deleted, whatever its gates.
        num_positions: Distances with a relative position; the paper has none, since gates tell what is recent.
        half_life: Timesteps, see `ForgetGates`.
        threshold: A memory is deleted once its gates have multiplied to less in every head.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        max_span: int,
        num_positions: int = 0,
        half_life: float = 256.0,
        threshold: float = 1e-6,
    ):
        super().__init__(max_span, ramp=1, num_positions=num_positions)
        check_integers(1, hidden_size=hidden_size, num_heads=num_heads)
        check_threshold(threshold)
        self.hidden_size, self.num_heads, self.half_life, self.threshold = hidden_size, num_heads, half_life, threshold
        self.gates = ForgetGates(hidden_size, num_heads, half_life)

    def span(self, memory: Memory) -> Tensor:
        return torch.full((1, 1), float(self.max_span), device=memory.hidden.device)

    def log_gate(self, memory: Memory) -> Tensor:
        return self.gates(memory.hidden)

    def keep(self, memory: Memory, age: Tensor, alive: Tensor, mass: Mass) -> Tensor:
        return alive & is_above_threshold(memory, self.threshold)


def is_above_threshold(memory: Memory, threshold: float) -> Tensor:
    """Return of which memories the gates of some head still multiply to at least the threshold, (N,) bool."""
    assert memory.log_decay is not None
    return (memory.log_decay >= math.log(threshold)).any(-1)


def check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie strictly between 0 and 1, got {threshold}")
