"""StreamingLLM (Xiao et al. 2024, arXiv 2309.17453): the first S timesteps of a stream stay, as sinks, and the last L.

    m_ti = 1 if t - i <= L or i < S else 0

Sinks take the attention of queries that need no memory. Distances are those in the stream (in the paper, those in the
cache), so that sinks have no relative position once they are farther away than `num_positions`. In a task with
episodes only the first one of a stream has sinks. Averages of spans count a sink's as L; `eval.span_cap` shortens them.
"""

import torch
from torch import Tensor

from ..checks import check_integers
from .mechanism import Mechanism
from .packed import Memory

ENDLESS = 2.0**40  # timesteps


class Streaming(Mechanism):
    """The last L hidden states, and the first S.

    Args:
        max_span: L, timesteps.
        num_sinks: S, timesteps.
        num_positions: Distances with a relative position (None: all L).
    """

    def __init__(self, max_span: int, num_sinks: int = 4, num_positions: int | None = None):
        super().__init__(max_span, ramp=1, num_positions=max_span if num_positions is None else num_positions)
        check_integers(0, num_sinks=num_sinks)
        self.num_sinks, self.endless = num_sinks, num_sinks > 0

    @property
    def max_reach(self) -> int:
        return self.max_span  # of all but the sinks

    @property
    def max_memories(self) -> int:
        return self.max_span + self.num_sinks

    def span(self, memory: Memory) -> Tensor:
        is_sink = (memory.time < self.num_sinks)[:, None]  # (N, 1)
        return torch.where(is_sink, ENDLESS, float(self.max_span))
