"""Distributions of actions, made of a model's outputs (..., n). One has three members:

log_prob(action)    log-probability, or density, of actions (...) or (..., k): (...)
entropy()           (...), in nats
sample(noise)       one action for each row of outputs (B, n); `noise` draws its random numbers

A task chooses one by `RLTask.action_distribution`.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus


class Noise(Protocol):
    """Random numbers for the environments of this process."""

    def exponential(self, like: Tensor) -> Tensor:
        """Exponentially distributed, of the shape of `like` (B, n)."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Normally distributed, of the shape of `like` (B, n)."""
        ...


class ActionDistribution(Protocol):
    """See above."""

    def log_prob(self, action: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...

    def sample(self, noise: Noise) -> Tensor: ...


class Categorical:
    """One of n actions, numbered from 0: (...) int64.

    Args:
        outputs: (..., n) logits.
    """

    def __init__(self, outputs: Tensor):
        self.log_probs = outputs.log_softmax(-1)  # (..., n)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action[..., None])[..., 0]

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def sample(self, noise: Noise) -> Tensor:
        probs = self.log_probs.exp()
        return (probs / noise.exponential(probs)).argmax(1)  # as torch.multinomial draws a single sample


class MultiCategorical:
    """Several independent choices at a time: (..., k) int64.

    Args:
        outputs: (..., n) logits, those of the first choice first.
        sizes: of each of the k choices; their sum is n.
    """

    def __init__(self, outputs: Tensor, sizes: Sequence[int]):
        self.choices = [Categorical(logits) for logits in outputs.split(list(sizes), -1)]

    def log_prob(self, action: Tensor) -> Tensor:
        parts = zip(self.choices, action.unbind(-1), strict=True)
        return torch.stack([choice.log_prob(part) for choice, part in parts]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([choice.entropy() for choice in self.choices]).sum(0)

    def sample(self, noise: Noise) -> Tensor:
        return torch.stack([choice.sample(noise) for choice in self.choices], -1)


class Gaussian:
    """Independent real numbers: (..., k) floats.

    Both mean and standard deviation are outputs of the model, so that every parameter of the policy is one of the
    model's, and exploration may depend on what is remembered. The softplus has a gradient everywhere, where a clamped
    logarithm would get stuck at its bounds.

    Args:
        outputs: (..., 2 k): means, then what softplus turns into standard deviations; about 0.7 in the beginning.
    """

    MIN_STD = 1e-3

    def __init__(self, outputs: Tensor):
        self.mean, pre_std = outputs.chunk(2, -1)  # (..., k) each
        self.std = softplus(pre_std) + self.MIN_STD

    def log_prob(self, action: Tensor) -> Tensor:
        scaled = (action - self.mean) / self.std
        return (-scaled.square() / 2 - self.std.log() - math.log(2 * math.pi) / 2).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + (1 + math.log(2 * math.pi)) / 2).sum(-1)

    def sample(self, noise: Noise) -> Tensor:
        return self.mean + self.std * noise.normal(self.mean)
