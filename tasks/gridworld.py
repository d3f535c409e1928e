"""Gridworlds in batches: B worlds that step together, as tensors on one device, without a loop over worlds.

An agent sees the 3 x 3 cells around it and moves up, right, down or left (actions 0 to 3); against a wall it stays
where it is. Every cell is a bag of words, so an observation is multi-hot: cell by cell from the upper left, word by
word in the order of the task's `words`, and after the nine cells what else the task tells.

    # # #      block      block        block
    . @ .      (nothing)  agent        (nothing)
    # R #      block      door, red    block

A gridworld has these instead of a task's streams (stream.py), and grows harder by `feedback` as they do:

    actions: int         number of different actions; classes: one more, for the value
    vocabulary: int      length of an observation
    measure: str         which of the figures in `Worlds.ended` is its result
    progress: str        which of them, as a mean over episodes, `feedback` is to be told
    worlds(environments, device, seed, split) -> Worlds      "train" is at the present stage, all else at the last
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .stream import SPLITS

UP, RIGHT, DOWN, LEFT = range(4)
RED, BLUE = range(2)
LEGEND = {" ": "", "#": "block", "r": "object red", "b": "object blue", "R": "door red", "B": "door blue"}


class Gridworld:
    """What corridor and portal share: the growing stage, and the words beside the cells'.

    stage               how large the episodes are that begin from now on, from `first` to `full`
    evaluated           how large they are in valid and in test
    bar                 mean of `progress` from which the stage grows
    wait                feedbacks that a stage lasts at least, as the first may be about episodes begun before it
    last_action         whether the agent is told its last action: four words, none of them before the first action
    """

    actions = 4
    classes = actions + 1  # what a model puts out: the actions' scores, and the value
    words: tuple[str, ...]
    extra = 0  # words beside the cells' and the last action's
    measure = progress = "success"

    def __init__(self, first: int, full: int, evaluated: int, bar: float, wait: int, last_action: bool, seed: int):
        if wait < 1:
            raise ValueError(f"task.wait must be at least 1 feedback, got {wait}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.stage, self.full, self.evaluated, self.bar, self.wait = first, full, evaluated, bar, wait
        self.last_action, self.seed = last_action, seed
        self.feedbacks = 0  # at this stage

    @property
    def vocabulary(self) -> int:
        return 9 * len(self.words) + self.extra + self.actions * self.last_action

    def worlds(
        self, environments: int, device: torch.device | str = "cpu", seed: int = 0, split: str = "train"
    ) -> "Worlds":
        """Worlds at the start of their first episodes; `seed` tells apart several of a split in one run."""
        if environments < 1:
            raise ValueError(f"there must be at least 1 environment, got {environments}")
        mixed = np.random.SeedSequence([self.seed, SPLITS.index(split), seed]).generate_state(1, np.uint64)
        return self.make(environments, torch.Generator(device).manual_seed(int(mixed[0])), split == "train")

    def make(self, environments: int, generator: torch.Generator, train: bool) -> "Worlds":
        raise NotImplementedError

    def harder(self) -> int:
        """The stage after this one."""
        raise NotImplementedError

    def feedback(self, progress: float) -> None:
        """Mean of `progress` over the training episodes that ended of late; nan, where none did, counts for nothing."""
        if self.stage == self.full or math.isnan(progress):
            return
        self.feedbacks += 1
        if progress >= self.bar and self.feedbacks >= self.wait:
            self.stage, self.feedbacks = min(self.harder(), self.full), 0

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "feedbacks": self.feedbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.feedbacks = state["stage"], state["feedbacks"]


class Worlds:
    """B episodes side by side; one that ends is followed by a new one at once.

    What an episode consists of is drawn by `begin`, and changed by `move`: two methods, and the view, make a world.
    `ended` holds, after each step, the figures of every episode as they then stood, (B,) each, to be read where the
    step was the episode's last: success, return, length (timesteps), late (it ended by the time limit alone) ...
    """

    def __init__(self, task: Any, environments: int, generator: torch.Generator, train: bool):
        self.task, self.environments, self.generator, self.train = task, environments, generator, train
        self.device = generator.device
        self.told = torch.eye(task.actions + 1, device=self.device)[:, 1:]  # (5, 4): row 0 is no action yet
        self.zeros = torch.zeros(environments, dtype=torch.int64, device=self.device)
        self.ended: dict[str, Tensor] = {}
        self.episode = SimpleNamespace(**self.fresh())  # tensors (B, ...), replaced by every step, never written into

    @property
    def steps(self) -> Tensor:
        """Timesteps since the episode began, (B,) int64: 0 at its first observation."""
        return self.episode.steps

    @property
    def stage(self) -> int:
        return self.task.stage if self.train else self.task.evaluated

    def draw(self, least: int, most: int, *each: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from least to most: (B, *each)."""
        shape = (self.environments, *each)
        return torch.randint(least, most + 1, shape, generator=self.generator, device=self.device, dtype=dtype)

    def begin(self) -> dict[str, Tensor]:
        """B new episodes, of which those are used whose world needs one; `limit` (B,), in timesteps, among the rest."""
        raise NotImplementedError

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Moves the agents: reward (B,) float32, whether the episode is over (B,) bool, and its further figures."""
        raise NotImplementedError

    def seen(self) -> list[tuple[Tensor, Tensor]]:
        """The observation in parts: a table (n, words) and each world's row in it (B,)."""
        raise NotImplementedError

    def drawing(self, world: int) -> tuple[list[str], int, int, str]:
        """One world as rows of the legend's letters, the agent's row and column in them, and a caption."""
        raise NotImplementedError

    def observe(self) -> Tensor:
        """What each agent sees: (B, vocabulary) float32, multi-hot."""
        parts = self.seen()
        if self.task.last_action:
            parts.append((self.told, self.episode.action))
        return torch.cat([table.index_select(0, row) for table, row in parts], dim=1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Takes action (B,) int64, 0 to 3; gives reward (B,) float32 and done (B,) bool: those are in a new episode."""
        reward, done = self.advance(action)
        self.restart(done)
        return reward, done

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """A step without what follows it: the done worlds still show their last observation."""
        reward, over, figures = self.move(action)
        episode = self.episode
        episode.steps, episode.gained, episode.action = episode.steps + 1, episode.gained + reward, action + 1
        late = (episode.steps >= episode.limit) & ~over
        self.ended = {"return": episode.gained, "length": episode.steps, "late": late, **figures}
        return reward, over | late

    def restart(self, done: Tensor) -> None:
        """New episodes for the worlds of the mask (B,)."""
        new = self.fresh()
        for name, value in vars(self.episode).items():
            mask = done if value.dim() == 1 else done[:, None]
            setattr(self.episode, name, torch.where(mask, new[name], value))

    def fresh(self) -> dict[str, Tensor]:
        return {"steps": self.zeros, "gained": self.zeros.float(), "action": self.zeros, **self.begin()}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "episode": dict(vars(self.episode))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = len(state["episode"]["steps"])
        if saved != self.environments:
            raise ValueError(f"train.batch must be {saved} environments as in the checkpoint, got {self.environments}")
        self.generator.set_state(state["generator"].cpu())
        self.episode = SimpleNamespace(**{name: value.to(self.device) for name, value in state["episode"].items()})

    def frame(self, world: int = 0, width: int = 78) -> str:
        """One world as text, at most `width` columns of it around the agent."""
        rows, row, column, caption = self.drawing(world)
        rows[row] = rows[row][:column] + "@" + rows[row][column + 1 :]
        left = max(0, min(column - width // 2, len(rows[row]) - width))
        caption += f", step {self.episode.steps[world]}, return {self.episode.gained[world]:.1f}"
        return "\n".join([*(each[left : left + width] for each in rows), caption])


def view(rows: list[str], row: int, column: int, words: tuple[str, ...]) -> Tensor:
    """The 3 x 3 cells of a drawing around the agent's, as words: (9 * len(words),) float32."""
    cells = torch.zeros(3, 3, len(words))
    for down in range(3):
        for right in range(3):
            found = LEGEND[rows[row + down - 1][column + right - 1]].split() + ["agent"] * (down == right == 1)
            cells[down, right, [words.index(word) for word in found]] = 1
    return cells.flatten()


def noticed(task: Gridworld, observation: Tensor) -> str:
    """The legend's letter of an object or door among the nine cells of an observation (vocabulary,), else a dot."""
    cells = observation[: 9 * len(task.words)].view(9, -1)
    for letter in "rbRB":
        there = [task.words.index(word) for word in LEGEND[letter].split() if word in task.words]
        if len(there) == 2 and cells[:, there].all(1).any():
            return letter
    return "."
