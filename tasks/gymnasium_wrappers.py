"""Wrappers of single environments that Gymnasium does not have, for task.wrappers."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation


class SelectObservation(TransformObservation):
    """Leave only some numbers of an observation, such as CartPole's positions without its velocities.

    Args:
        env: with observations in a Box of one dimension.
        indices: of the numbers that are left.

    Raises:
        ValueError: for another space, or an index that it does not have.
    """

    def __init__(self, env: gymnasium.Env, indices: Sequence[int]):
        space: Any = env.observation_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(f"SelectObservation needs a Box of one dimension, got {space}")
        chosen = np.asarray(indices, dtype=np.int64)
        if not len(chosen) or not ((chosen >= 0) & (chosen < space.shape[0])).all():
            raise ValueError(f"indices must be some of 0 to {space.shape[0] - 1}, got {list(indices)}")
        selected = Box(space.low[chosen], space.high[chosen], dtype=space.dtype.type)
        super().__init__(env, lambda observation: observation[chosen], selected)
