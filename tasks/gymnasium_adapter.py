"""Corridor and portal as gymnasium's vector environments, for other people's agents: pip install 'expire-span[rl]'.

    worlds = GymnasiumWorlds(Corridor(longest=20), num_envs=64)
    observations, infos = worlds.reset(seed=1)

An episode that ends is followed by the next at once (AutoresetMode.SAME_STEP): the observation that a step returns is
the new one's first, infos["final_obs"] has the old one's last, and infos["final_info"] its figures.
"""

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from .gridworld import Gridworld


class GymnasiumWorlds(VectorEnv):
    """`num_envs` worlds of a task; observations and all else are NumPy arrays, wherever the worlds are computed.

    An episode that ends by the time limit alone is truncated, any other terminated.
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
        self.single_observation_space = Box(0.0, 1.0, (task.vocabulary,), np.float32)
        self.single_action_space = Discrete(task.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.worlds = task.worlds(num_envs, device, split=split)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New episodes everywhere, or only where options["reset_mask"], (num_envs,) bool, says so."""
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask")
        if mask is None:
            drawn = int(self.np_random.integers(2**31))
            self.worlds = self.task.worlds(self.num_envs, self.device, drawn, self.split)
        else:
            self.worlds.restart(torch.as_tensor(mask, device=self.worlds.device))
        return array(self.worlds.observe()), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Raises ValueError for actions outside the space."""
        actions = np.asarray(actions)
        if not self.action_space.contains(actions):
            wanted = f"{self.num_envs} whole numbers from 0 to {self.task.actions - 1}"
            raise ValueError(f"actions must be {wanted}, got {actions.tolist()}")
        reward, done = self.worlds.advance(torch.as_tensor(actions, dtype=torch.int64, device=self.worlds.device))
        over, late = array(done), array(self.worlds.ended["late"])
        infos: dict[str, Any] = {}
        if over.any():
            last, figures = array(self.worlds.observe()), {key: array(each) for key, each in self.worlds.ended.items()}
            for world in over.nonzero()[0]:
                told = {"final_obs": last[world], "final_info": {key: each[world] for key, each in figures.items()}}
                infos = self._add_info(infos, told, int(world))
        self.worlds.restart(done)
        return array(self.worlds.observe()), array(reward).astype(np.float64), over & ~late, over & late, infos

    def render(self) -> tuple[str, ...] | None:
        """Every world as text, where render_mode is "ansi"."""
        return tuple(self.worlds.frame(world) for world in range(self.num_envs)) if self.render_mode else None


def array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()
