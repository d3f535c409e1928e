"""Checks of arguments, whose messages name the argument."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor


def check_integers(minimum: int, **arguments: Any) -> None:
    """Raise ValueError unless all arguments are integers that are not below the minimum."""
    for name, value in arguments.items():
        if not isinstance(value, Integral) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value}")


def check_tokens(tokens: Tensor, batch_size: int, vocab_size: int) -> None:
    """Raise ValueError for tokens of a wrong shape, see `Transformer.embed`, or, on a CPU, not of the vocabulary.

    On other devices the ids are not looked at, as that would wait for the device.
    """
    shape = tuple(tokens.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"tokens must be (B, T) or (B, T, F), and not empty, got {shape}")
    if shape[0] != batch_size:
        raise ValueError(f"tokens must be of as many samples as the state, {batch_size}, got {shape}")
    if tokens.is_floating_point():
        if len(shape) != 3 or shape[2] != vocab_size:
            raise ValueError(f"tokens that are floats must be (B, T, vocab_size={vocab_size}), got {shape}")
    elif tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = (int(token) for token in tokens.aminmax())
        if smallest < 0 or largest >= vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"tokens must lie between 0 and vocab_size - 1 = {vocab_size - 1}, got {wrong}")
