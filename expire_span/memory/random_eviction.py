"""Random eviction, to compare others with: after each block any memory goes with the same probability.

So the older ones are the rarer ones: most of what is held is recent.
"""

import torch
from torch import Tensor

from .eviction import Eviction
from .mechanism import Mass
from .packed import Memory

FACTORS = (0x9E3779B1, 0x85EBCA77)  # large, odd and unlike each other, of xxHash


class RandomEviction(Eviction):
    """Memories at random: the same timesteps in all streams, and each time. Arguments as those of `Eviction`."""

    def priority(self, memory: Memory, age: Tensor, mass: Mass) -> Tensor:
        next_block = memory.time + age  # its first timestep
        return hashed(memory.time, next_block)


def hashed(*numbers: Tensor) -> Tensor:
    """Return what looks like random numbers in [0, 1), made of integers (N,)."""
    mixed = torch.zeros_like(numbers[0])
    for number, factor in zip(numbers, FACTORS, strict=True):
        mixed = (mixed ^ number) * factor & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x27D4EB2F & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 13)) >> 8).float() / 2**24
