"""Environments that check the actions they get, and fail on demand: task.id=checking_envs:CheckingEnv."""

from copy import deepcopy

import gymnasium
import numpy as np
from gymnasium import spaces

SPACES = {  # by what a test calls them; a config can hold the names
    "box": spaces.Box(np.array([-2, 0], np.float32), np.array([2, 10], np.float32)),
    "half_bounded": spaces.Box(np.array([[0], [-np.inf]], np.float32), np.array([[np.inf], [5]], np.float32)),
    "pixels": spaces.Box(0, 255, (3, 2, 1), np.uint8),
    "discrete": spaces.Discrete(3, start=-1),
    "multi_discrete": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [0, -2]]),
    "multi_binary": spaces.MultiBinary((2, 2)),
    "dict": spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Tuple([spaces.Box(0, 1, (2,)), spaces.MultiBinary(3)])}),
    "tuple": spaces.Tuple([spaces.MultiDiscrete([2, 3]), spaces.Dict({"x": spaces.Box(-1, 1, ())})]),
    "text": spaces.Text(5),
    "text_within": spaces.Dict({"seen": spaces.Tuple([spaces.Discrete(2), spaces.Text(5)])}),
}


class CheckingEnv(gymnasium.Env):
    """Observations are random, and each action gives reward 1.

    Args:
        observation, action: The name of a space.
        length: Timesteps of an episode.
        truncated: Whether it is truncated, and not terminated.
        raises_at, nan_at, nan_reward_at: The step, over all episodes, at which something goes wrong.
        success: What the last info tells, if it tells anything.
    """

    def __init__(
        self,
        observation="box",
        action="discrete",
        length=5,
        truncated=False,
        raises_at=None,
        nan_at=None,
        nan_reward_at=None,
        success=None,
    ):
        self.observation_space, self.action_space = deepcopy(SPACES[observation]), deepcopy(SPACES[action])
        self.length, self.is_truncated, self.success = length, truncated, success
        self.raises_at, self.nan_at, self.nan_reward_at = raises_at, nan_at, nan_reward_at
        self.all_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if seed is not None:
            self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        if action not in self.action_space:
            raise AssertionError(f"{action} is not in {self.action_space}")
        self.steps += 1
        self.all_steps += 1
        if self.all_steps == self.raises_at:
            raise ValueError("the motor is on fire")
        observation = self.observation_space.sample()
        if self.all_steps == self.nan_at:
            observation = np.full_like(observation, np.nan)
        reward = float("nan") if self.all_steps == self.nan_reward_at else 1.0
        is_over = self.steps == self.length
        info = {"is_success": self.success} if is_over and self.success is not None else {}
        return observation, reward, is_over and not self.is_truncated, is_over and self.is_truncated, info


class SameStepVectorEnv(gymnasium.vector.VectorEnv):
    """Environments that begin new episodes in the step that ends one, which cannot be used."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs, **_):
        self.num_envs = num_envs


gymnasium.register("SameStep-v0", entry_point=CheckingEnv, vector_entry_point=SameStepVectorEnv)


class DrawnEnv(CheckingEnv):
    """One that can be drawn, as text with colors or as an image, both of which show the step within the episode."""

    metadata = {"render_modes": ["human", "rgb_array", "ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(self, render_mode=None, cannot_be_drawn=False, **options):
        super().__init__(**options)
        self.render_mode, self.cannot_be_drawn = render_mode, cannot_be_drawn

    def render(self):
        if self.cannot_be_drawn:
            raise ImportError("no paint")
        if self.render_mode == "ansi":
            return f"\033[31mstep {self.steps}\033[0m\n|---|\n"
        return np.full((6, 8, 3), self.steps, np.uint8)
