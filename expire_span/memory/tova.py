"""TOVA (Oren et al. 2024, arXiv 2401.06104): what the latest query attends to least is evicted.

    priority_i = mean over the heads of a_ti, for the last query t of the block

The memory of the last query itself, which no query has seen yet, always stays.
"""

import torch
from torch import Tensor

from .eviction import Eviction
from .mechanism import Mass
from .packed import Memory


class Tova(Eviction):
    """The memories that the last query of a block attends to most, and its own. Arguments as those of `Eviction`."""

    def priority(self, memory: Memory, age: Tensor, mass: Mass) -> Tensor:
        own = age == 1  # no query has seen it yet
        return mass(slice(-1, None)).float().mean(-1).masked_fill(own, torch.inf)
