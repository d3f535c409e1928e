"""Batched gridworlds: B environments that step together, as tensors on one device, without a loop over environments.

An agent sees the 3 x 3 cells around it and moves up, right, down or left (actions 0 to 3); at a wall it stays where it
is. Every cell is a bag of words, so an observation is multi-hot: cell by cell from the upper left, word by word in the
order of the task's `cell_words`, and after the nine cells whatever else the task lets the agent observe.

    # # #      block      block        block
    . @ .      (nothing)  agent        (nothing)
    # R #      block      door, red    block
"""

import math
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SPLITS, AutoresetMode, Envs, RLTask, View

UP, RIGHT, DOWN, LEFT = range(4)
RED, BLUE = range(2)
ACTIONS = {"^": "up", ">": "right", "v": "down", "<": "left"}  # actions 0 to 3
LEGEND = {" ": "", "#": "block", "r": "object red", "b": "object blue", "R": "door red", "B": "door blue"}
FLOOR = (245, 245, 247)
COLORS = {  # of the legend and the agent in an image: red, green, blue
    "#": (150, 155, 165),
    "@": (255, 200, 0),
    "r": (214, 39, 40),
    "b": (31, 119, 180),
    "R": (240, 128, 128),
    "B": (135, 190, 235),
}


class Gridworld(RLTask):
    """What corridor and portal share: the curriculum, and the length of an observation.

    Args:
        initial_stage: Size of the first training episodes: maximum length of a corridor, number of rooms.
        final_stage: Size up to which they grow.
        eval_stage: Size of the episodes of valid and test.
        curriculum_threshold: Mean of `progress_metric` from which they grow.
        curriculum_min_intervals: Minimum number of calls of `update_curriculum` that a stage lasts; the first one may
            be about episodes that began in the stage before.
        observe_last_action: Whether the agent observes its last action: four words, none of them before the first.
        seed: Seed of the random numbers.
        num_extra_words: Number of words of an observation beside those of the cells and the last action.
    """

    num_actions = 4
    num_classes = num_actions + 1
    metric = progress_metric = "success"
    cell_words: tuple[str, ...]
    curriculum_stage: int

    def __init__(
        self,
        initial_stage: int,
        final_stage: int,
        eval_stage: int,
        curriculum_threshold: float,
        curriculum_min_intervals: int,
        observe_last_action: bool,
        seed: int,
        num_extra_words: int = 0,
    ):
        if curriculum_min_intervals < 1:
            limits = f"at least 1 interval, got {curriculum_min_intervals}"
            raise ValueError(f"task.curriculum_min_intervals must be {limits}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.curriculum_stage, self.final_stage, self.eval_stage = initial_stage, final_stage, eval_stage
        self.curriculum_threshold, self.curriculum_min_intervals = curriculum_threshold, curriculum_min_intervals
        self.observe_last_action, self.seed = observe_last_action, seed
        self.vocab_size = 9 * len(self.cell_words) + num_extra_words + self.num_actions * observe_last_action
        self.intervals = 0  # calls of update_curriculum at this stage

    def make_envs(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        split: str = "train",
        first: int = 0,
        total: int | None = None,
        autoreset_mode: AutoresetMode = "same_step",
    ) -> "GridworldEnvs":
        if num_envs < 1:
            raise ValueError(f"there must be at least 1 environment, got {num_envs}")
        mixed = np.random.SeedSequence([self.seed, SPLITS.index(split), seed]).generate_state(1, np.uint64)
        draws = Draws(torch.Generator(device).manual_seed(int(mixed[0])), first, num_envs, total or num_envs)
        envs = self.create_envs(draws, split == "train")
        envs.autoreset_mode = autoreset_mode
        return envs

    @abstractmethod
    def create_envs(self, draws: "Draws", train: bool) -> "GridworldEnvs":
        """Return environments that draw their episodes from `draws`, on its device."""

    @abstractmethod
    def next_stage(self) -> int:
        """The stage after the present one."""

    def view(self, envs: Envs, width: int) -> View:
        """See `RLTask`; the image has one pixel for each cell."""
        assert isinstance(envs, GridworldEnvs)
        *rows, caption = envs.render(width=width).splitlines()
        columns = max(map(len, rows))
        cells = [[COLORS.get(letter, FLOOR) for letter in row.ljust(columns)] for row in rows]
        return View(rows, np.array(cells, np.uint8), caption, landmark_in_view(self, envs.observe()[0]))

    def describe_action(self, action: Tensor) -> tuple[str, str]:
        arrow = list(ACTIONS)[int(action)]
        return arrow, f"goes {ACTIONS[arrow]}"

    def update_curriculum(self, progress: float) -> None:
        """Enlarge the episodes that begin from now on once the mean progress is high enough; nan does not count."""
        if self.curriculum_stage == self.final_stage or math.isnan(progress):
            return
        self.intervals += 1
        if progress >= self.curriculum_threshold and self.intervals >= self.curriculum_min_intervals:
            self.curriculum_stage, self.intervals = min(self.next_stage(), self.final_stage), 0

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum_stage": self.curriculum_stage, "intervals": self.intervals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum_stage, self.intervals = state["curriculum_stage"], state["intervals"]


class Draws:
    """Random numbers for `num_envs` environments of `total`, which are drawn together so that all see the same.

    Args:
        generator: of the random numbers, and their device.
        first: number of the first of these environments.
    """

    def __init__(self, generator: torch.Generator, first: int, num_envs: int, total: int):
        self.generator, self.num_envs, self.total = generator, num_envs, total
        self.rows = slice(first, first + num_envs)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Uniform integers from low to high, both included: (B, *shape)."""
        size, device = (self.total, *shape), self.generator.device
        return torch.randint(low, high + 1, size, generator=self.generator, device=device, dtype=dtype)[self.rows]


class GridworldEnvs(ABC):
    """B episodes in parallel; one that ends is followed by a new one at once.

    A gridworld implements `sample_episodes`, `transition`, `observation_parts` and `ascii_map`.

    Attributes:
        episode: what the episodes consist of, tensors (B, ...). Steps replace them and never write into them.
        episode_info: after each step, (B,) each, to be read where the step was the last of its episode: success,
            episode_return, episode_length (timesteps), truncated (ended by max_episode_steps alone) ...
        resetting: (B,) bool, see `Envs`.
        autoreset_mode: "same_step" or "next_step", see `Envs`.
    """

    def __init__(self, task: Gridworld, draws: Draws, train: bool):
        self.task, self.draws, self.num_envs, self.train = task, draws, draws.num_envs, train
        self.device = draws.generator.device
        self.last_action_words = torch.eye(task.num_actions + 1, device=self.device)[:, 1:]  # (5, 4): row 0 is none yet
        self.zeros = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.episode_info: dict[str, Tensor] = {}
        self.autoreset_mode: AutoresetMode = "same_step"
        self.resetting = self.zeros.bool()
        self.episode = SimpleNamespace(**self.initial_episodes())

    @property
    def steps(self) -> Tensor:
        """(B,) int64: timesteps since each episode began; 0 at its first observation."""
        return self.episode.steps

    @property
    def stage(self) -> int:
        """The size of the episodes that begin from now on."""
        return self.task.curriculum_stage if self.train else self.task.eval_stage

    @abstractmethod
    def sample_episodes(self) -> dict[str, Tensor]:
        """Draw B new episodes, of which `reset` uses those it needs; with `max_episode_steps` (B,) among the rest."""

    @abstractmethod
    def transition(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Move the agents.

        Returns:
            reward: (B,) float32.
            terminated: (B,) bool.
            info: what `episode_info` has beside the keys that all gridworlds share, (B,) each.
        """

    @abstractmethod
    def observation_parts(self) -> list[tuple[Tensor, Tensor]]:
        """The observation in parts: a table (n, words) and the row of it that each agent observes (B,)."""

    @abstractmethod
    def ascii_map(self, env: int) -> tuple[list[str], int, int, str]:
        """Draw one environment: rows of the legend's letters, the agent's row and column in them, a caption."""

    def observe(self) -> Tensor:
        """What each agent observes: (B, vocab_size) float32, multi-hot."""
        parts = self.observation_parts()
        if self.task.observe_last_action:
            parts.append((self.last_action_words, self.episode.last_action))
        return torch.cat([table.index_select(0, row) for table, row in parts], dim=1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step in all environments, and reset those whose episode ended.

        Args:
            action: Actions, (B,) int64, 0 to 3.

        Returns:
            reward: (B,) float32.
            done: (B,) bool: the episode was terminated or truncated, and a new one begins, now or in the next step.
        """
        reward, done = self.step_without_reset(action)
        if self.autoreset_mode == "same_step":
            self.reset(done)
            return reward, done
        reward, done = reward * ~self.resetting, done & ~self.resetting
        self.reset(self.resetting)
        self.resetting = done
        return reward, done

    def step_without_reset(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """As `step`, but environments that are done still show the last observation of their episode."""
        reward, terminated, info = self.transition(action)
        episode = self.episode
        episode.steps = episode.steps + 1
        episode.episode_return = episode.episode_return + reward
        episode.last_action = action + 1
        truncated = (episode.steps >= episode.max_episode_steps) & ~terminated
        self.episode_info = {
            "episode_return": episode.episode_return,
            "episode_length": episode.steps,
            "truncated": truncated,
            **info,
        }
        return reward, terminated | truncated

    def reset(self, mask: Tensor) -> None:
        """Begin new episodes where mask (B,) bool is true."""
        new = self.initial_episodes()
        for name, value in vars(self.episode).items():
            condition = mask if value.dim() == 1 else mask[:, None]
            setattr(self.episode, name, torch.where(condition, new[name], value))

    def initial_episodes(self) -> dict[str, Tensor]:
        """New episodes at their first timestep."""
        counters = {"steps": self.zeros, "episode_return": self.zeros.float(), "last_action": self.zeros}
        return {**counters, **self.sample_episodes()}

    def state_dict(self) -> dict[str, Any]:
        per_env = dict(vars(self.episode))
        if self.autoreset_mode == "next_step":
            per_env["resetting"] = self.resetting
        return {"generator": self.draws.generator.get_state(), "per_env": per_env}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = len(state["per_env"]["steps"])
        if saved != self.num_envs:
            limits = f"{saved} environments as in the checkpoint, got {self.num_envs}"
            raise ValueError(f"train.batch_size must be {limits}")
        self.draws.generator.set_state(state["generator"].cpu())
        per_env = {name: value.to(self.device) for name, value in state["per_env"].items()}
        self.resetting = per_env.pop("resetting", self.resetting)
        self.episode = SimpleNamespace(**per_env)

    def render(self, env: int = 0, width: int = 78) -> str:
        """Draw one environment as text, at most `width` columns of it around the agent."""
        rows, row, column, caption = self.ascii_map(env)
        rows[row] = rows[row][:column] + "@" + rows[row][column + 1 :]
        left = max(0, min(column - width // 2, len(rows[row]) - width))
        caption += f", step {self.episode.steps[env]}, return {self.episode.episode_return[env]:.1f}"
        return "\n".join([*(line[left : left + width] for line in rows), caption])


def agent_view(rows: list[str], row: int, column: int, cell_words: tuple[str, ...]) -> Tensor:
    """The 3 x 3 cells of a map around an agent at (row, column), as words: (9 * len(cell_words),) float32."""
    cells = torch.zeros(3, 3, len(cell_words))
    for down in range(3):
        for right in range(3):
            words = LEGEND[rows[row + down - 1][column + right - 1]].split() + ["agent"] * (down == right == 1)
            cells[down, right, [cell_words.index(word) for word in words]] = 1
    return cells.flatten()


def landmark_in_view(task: Gridworld, observation: Tensor) -> str:
    """The legend's letter of the object or door that an observation (vocab_size,) shows; "." if there is none."""
    cells = observation[: 9 * len(task.cell_words)].view(9, -1)
    for letter in "rbRB":
        words = [task.cell_words.index(word) for word in LEGEND[letter].split() if word in task.cell_words]
        if len(words) == 2 and cells[:, words].all(1).any():
            return letter
    return "."
