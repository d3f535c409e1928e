"""Expire-Span with forget gates (ours): a span decides when a memory dies, gates how much weight it has until then.

    m_ti = clamp(1 + (e_i - (t - i)) / R, 0, 1)
    a_ti = softmax over i of  score_ti + log m_ti + sum of log f_j over i < j <= t

Spans and their loss are those of `expire_span.py`, gates and their threshold those of `fox.py`.
"""

from torch import Tensor

from ..checks import check_integers
from .expire_span import ExpireSpan
from .fox import ForgetGates, check_threshold, is_above_threshold
from .mechanism import Mass
from .packed import Memory


class ExpireFox(ExpireSpan):
    """Expire-Span whose memories also lose weight by forget gates.

    Args:
        num_heads: H, the number of attention heads.
        half_life, threshold: As in `Fox`.
        hidden_size, max_span, ramp, alpha, num_positions, init_span_ratio, pre_div, random_drop: As in `ExpireSpan`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        max_span: int,
        ramp: float,
        alpha: float,
        num_positions: int,
        init_span_ratio: float = 0.1,
        pre_div: float = 1.0,
        random_drop: bool = False,
        half_life: float = 256.0,
        threshold: float = 1e-6,
    ):
        super().__init__(hidden_size, max_span, ramp, alpha, num_positions, init_span_ratio, pre_div, random_drop)
        check_integers(1, num_heads=num_heads)
        check_threshold(threshold)
        self.num_heads, self.half_life, self.threshold = num_heads, half_life, threshold
        self.gates = ForgetGates(hidden_size, num_heads, half_life)

    def log_gate(self, memory: Memory) -> Tensor:
        return self.gates(memory.hidden)

    def keep(self, memory: Memory, age: Tensor, alive: Tensor, mass: Mass) -> Tensor:
        return alive & is_above_threshold(memory, self.threshold)
