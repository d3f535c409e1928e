"""Copy (section 5.2, table 1): remember how many A's were shown, until the end of a long episode.

Somewhere among B's, an episode shows n A's in a row, with n drawn from 1 to 4. Much later, in its last block, comes a
cue. After the cue the model must write the same number of A's and a full stop. Only these are scored, and together:
all of them right or wrong. Guessing n is right 1 / max_count of the time.

    B B A A A B B B B B ... B B B B B | B B B ? A A A . B
                                      |       A A A .        targets: the next token, from the cue on
            <---- answer_distance ---------->                | the last block

The paper only says that A's far in the past are to be copied and that the rest is B. The form of an episode and the
growing length of the training episodes are our choice.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .base import IGNORE_INDEX, SPLITS, Batch, Task

A, B, CUE, STOP = range(4)


class Copy(Task):
    """Episodes of `episode_length` timesteps, shorter ones first. All streams of a batch are in step.

    Args:
        episode_length: Timesteps of an episode, a multiple of the block size.
        seed: Seed of the random numbers.
        max_count: Highest number of A's; the number is uniform from 1 to this.
        initial_episode_length: Length of the first training episodes, which doubles up to `episode_length` (None:
            `episode_length` at once).
        curriculum_threshold: Mean training accuracy from which the length doubles.
        curriculum_max_intervals: Number of calls of `update_curriculum` after which it doubles anyway (None: never).
        num_eval_episodes: Number of episodes of valid and of test each, rounded up to whole batches; all are of
            `episode_length`.

    Raises:
        ValueError: if the arguments do not fit each other or, in `stream`, the block size.
    """

    vocab_size = num_classes = 4
    vocab = "AB?."
    metric = "accuracy"
    scoring = "sequence"
    curriculum_stage: int  # length of the training episodes that begin from now on

    def __init__(
        self,
        episode_length: int,
        seed: int = 0,
        max_count: int = 4,
        initial_episode_length: int | None = None,
        curriculum_threshold: float = 0.9,
        curriculum_max_intervals: int | None = None,
        num_eval_episodes: int = 1024,
    ):
        initial_episode_length = episode_length if initial_episode_length is None else initial_episode_length
        if max_count < 1:
            raise ValueError(f"task.max_count must be at least 1, got {max_count}")
        shortest = 2 * max_count + 2
        if episode_length < shortest:
            raise ValueError(
                f"task.episode_length must be at least {shortest} timesteps to hold an episode, got {episode_length}"
            )
        if not shortest <= initial_episode_length <= episode_length:
            limits = f"{shortest} to task.episode_length={episode_length}"
            raise ValueError(f"task.initial_episode_length must be {limits} timesteps, got {initial_episode_length}")
        if curriculum_max_intervals is not None and curriculum_max_intervals < 1:
            advice = f"got {curriculum_max_intervals}; for no limit use null"
            raise ValueError(f"task.curriculum_max_intervals must be at least 1 interval, {advice}")
        if num_eval_episodes < 1:
            raise ValueError(f"task.num_eval_episodes must be at least 1, got {num_eval_episodes}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.episode_length, self.initial_episode_length = episode_length, initial_episode_length
        self.seed, self.max_count, self.num_eval_episodes = seed, max_count, num_eval_episodes
        self.curriculum_threshold = curriculum_threshold
        self.curriculum_max_intervals = curriculum_max_intervals
        self.curriculum_stage = initial_episode_length
        self.answered_length = 0  # length of the last training episode that was answered
        self.intervals = 0  # calls of update_curriculum at this stage

    def stream(self, split: str, batch_size: int, block_size: int) -> "CopyStream":
        for key in ("episode_length", "initial_episode_length"):
            if (length := getattr(self, key)) % block_size:
                nearest = math.ceil(length / block_size) * block_size
                raise ValueError(
                    f"task.{key} must be a multiple of block_size={block_size}, got {length}; use {nearest}"
                )
        if block_size < self.max_count + 2:
            raise ValueError(f"block_size must hold the answer, {self.max_count + 2} timesteps, got {block_size}")
        return CopyStream(self, split, batch_size, block_size)

    def sample_episodes(self, split: str, first: int, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw episodes number `first` to `first + count`.

        An episode depends only on its number, seed, split and length, not on how many are drawn together.

        Returns:
            end: (count,) timestep after the last A shown.
            num_shown: (count,) number of A's shown.
        """
        bit_generator = np.random.PCG64([self.seed, SPLITS.index(split), length]).advance(2 * first)
        uniform = np.random.Generator(bit_generator).random((count, 2))
        cue = self.cue(length)
        max_distance = cue - self.max_count + 1  # every distance from 1 to this is as likely, whatever the count
        distance = 1 + (uniform[:, 0] * max_distance).astype(np.int64)
        return cue - distance + 1, 1 + (uniform[:, 1] * self.max_count).astype(np.int64)

    def cue(self, length: int) -> int:
        """Timestep of the cue in an episode of this length."""
        return length - self.max_count - 2

    def update_curriculum(self, progress: float) -> None:
        """Double the length of the episodes that begin from now on once the training accuracy is high enough.

        An accuracy does not count (nor does nan) before an episode of the present length has been answered.
        """
        at_end = self.curriculum_stage == self.episode_length
        if at_end or self.answered_length != self.curriculum_stage or math.isnan(progress):
            return
        self.intervals += 1
        if progress >= self.curriculum_threshold or self.intervals == self.curriculum_max_intervals:
            self.curriculum_stage = min(2 * self.curriculum_stage, self.episode_length)
            self.intervals = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "curriculum_stage": self.curriculum_stage,
            "answered_length": self.answered_length,
            "intervals": self.intervals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curriculum_stage, self.intervals = state["curriculum_stage"], state["intervals"]
        self.answered_length = state["answered_length"]


class CopyStream:
    """Blocks of episodes. Each block is computed from the two numbers that define an episode."""

    def __init__(self, task: Copy, split: str, batch_size: int, block_size: int):
        self.task, self.split, self.batch_size, self.block_size = task, split, batch_size, block_size
        self.number = 0  # of the first stream's episode
        self.time = 0  # within the episode
        self.length = 0  # of the episode

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        train = self.split == "train"
        if not train and self.number >= self.task.num_eval_episodes:
            raise StopIteration
        if self.time == 0:
            self.length = self.task.curriculum_stage if train else self.task.episode_length
        end, num_shown = self.task.sample_episodes(self.split, self.number, self.batch_size, self.length)
        batch = self.block(end[:, None], num_shown[:, None])
        self.time += self.block_size
        if self.time == self.length:
            self.time, self.number = 0, self.number + self.batch_size
            if train:
                self.task.answered_length = self.length
        return batch

    def block(self, end: np.ndarray, num_shown: np.ndarray) -> Batch:  # (B, 1) each
        """The block at the present time of the episodes with these numbers."""
        cue, time = self.task.cue(self.length), np.arange(self.time, self.time + self.block_size)  # (T,)
        shown = (time >= end - num_shown) & (time < end)  # (B, T)
        scored = (time >= cue) & (time <= cue + num_shown)  # (B, T): the next token is an A or, at last, the full stop
        tokens = np.where(shown | (time > cue) & scored, A, B)
        tokens[:, time == cue] = CUE
        tokens[time == cue + num_shown + 1] = STOP
        targets = np.where(scored, np.where(time < cue + num_shown, A, STOP), IGNORE_INDEX)
        answer_distance = np.where(scored, cue - end + 1, 0)
        reach = np.broadcast_to(time, tokens.shape).copy()
        return Batch(*(torch.from_numpy(field) for field in (tokens, targets, reach, answer_distance)))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "time": self.time, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.time, self.length = state["number"], state["time"], state["length"]
