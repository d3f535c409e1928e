"""Key norms (Devoto et al. 2024, arXiv 2406.11430): what has a short key gets much attention, and stays.

    priority_i = - mean over the heads of |k_i|

Heads share one memory here, so that all of them keep the same.
"""

from torch import Tensor

from .eviction import Eviction
from .mechanism import Mass
from .packed import Memory


class KeyNorm(Eviction):
    """The memories with the shortest keys. Arguments as those of `Eviction`."""

    def priority(self, memory: Memory, age: Tensor, mass: Mass) -> Tensor:
        assert memory.kv is not None
        norm = memory.kv[0].detach().float().norm(dim=-1).mean(-1)  # (N,)
        return -norm.round(decimals=4)  # equal for equal keys, however they were computed
