"""Corridor and portal as vector environments of Gymnasium, for agents of your own: pip install 'expire-span[rl]'.

    envs = GymnasiumVectorEnv(Corridor(max_length=20), num_envs=64)
    observations, infos = envs.reset(seed=1)

Autoreset is AutoresetMode.SAME_STEP: when an episode ends, `step` returns the first observation of the next one;
infos["final_obs"] has the last observation of the one that ended, and infos["final_info"] its `episode_info`.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from .gridworld import Gridworld


class GymnasiumVectorEnv(VectorEnv):
    """`num_envs` environments of a gridworld. They compute on `device`, but return NumPy arrays.

    Episodes that end by max_episode_steps alone are truncated, all others terminated.
    """

    def __init__(
        self,
        task: Gridworld,
        num_envs: int = 1,
        device: torch.device | str = "cpu",
        split: str = "train",
        render_mode: str | None = None,
    ):
        self.task, self.num_envs, self.device, self.split, self.render_mode = task, num_envs, device, split, render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["ansi"], "render_fps": 8}
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode must be None or ansi, got {render_mode}")
        self.single_observation_space = Box(0.0, 1.0, (task.vocab_size,), np.float32)
        self.single_action_space = Discrete(task.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.envs = task.make_envs(num_envs, device, split=split)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes everywhere, or only where options["reset_mask"], (num_envs,) bool, is true."""
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask")
        if mask is None:
            env_seed = int(self.np_random.integers(2**31))
            self.envs = self.task.make_envs(self.num_envs, self.device, env_seed, self.split)
        else:
            self.envs.reset(torch.as_tensor(mask, device=self.envs.device))
        return to_numpy(self.envs.observe()), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take a step in all environments.

        Returns:
            observations (num_envs, vocab_size), rewards, terminated, truncated (num_envs,) and infos.

        Raises:
            ValueError: if an action is not in the action space.
        """
        actions = np.asarray(actions)
        if not self.action_space.contains(actions):
            expected = f"{self.num_envs} whole numbers from 0 to {self.task.num_actions - 1}"
            raise ValueError(f"actions must be {expected}, got {actions.tolist()}")
        action = torch.as_tensor(actions, dtype=torch.int64, device=self.envs.device)
        reward, done_mask = self.envs.step_without_reset(action)
        done, truncated = to_numpy(done_mask), to_numpy(self.envs.episode_info["truncated"])
        infos: dict[str, Any] = {}
        if done.any():
            final_obs = to_numpy(self.envs.observe())
            episode_info = {name: to_numpy(values) for name, values in self.envs.episode_info.items()}
            for env in done.nonzero()[0]:
                final_info = {name: values[env] for name, values in episode_info.items()}
                infos = self._add_info(infos, {"final_obs": final_obs[env], "final_info": final_info}, int(env))
        self.envs.reset(done_mask)
        rewards = to_numpy(reward).astype(np.float64)
        return to_numpy(self.envs.observe()), rewards, done & ~truncated, done & truncated, infos

    def render(self) -> tuple[str, ...] | None:
        """Every environment as text if render_mode is "ansi", else None."""
        return tuple(self.envs.render(env) for env in range(self.num_envs)) if self.render_mode else None


def to_numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
