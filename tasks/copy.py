"""Copy: remember how many A's were shown, for as long as an episode lasts.

Somewhere among B's an episode shows n A's in a row, n drawn from 1 to 4. Much later, in its last block, stands a cue,
and after the cue the model must write the same number of A's and then a full stop. It is scored on these alone, all
of them right or all wrong, so that guessing n gives 1 / largest_count.

    B B A A A B B B B B ... B B B B B | B B B ? A A A . B
                                      |       A A A .        targets: the next token, from the cue on
            <------- distance --------------->               | the last block

The paper says only that A's far in the past are to be copied, "the rest B": the form, and the growing length of the
episodes, are our choice.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .stream import IGNORED, SPLITS, Batch

A, B, CUE, STOP = range(4)


class Copy:
    """Episodes of `distance` timesteps, shorter ones first; all streams of a batch are in step.

    distance            length of an episode in timesteps: a multiple of the block
    largest_count       n is uniform from 1 to this
    first_distance      length of the first training episodes, doubling up to `distance` (None: `distance` at once)
    bar                 mean accuracy from which training goes on to the next length
    patience            number of feedbacks after which it goes on anyway (None: never)
    episodes            number of episodes in valid and in test, in whole batches; always at the full `distance`

    Raises ValueError where these do not fit each other, or, in `stream`, the block.
    """

    vocabulary = classes = 4
    measure = "accuracy"
    answer = "block"

    def __init__(
        self,
        distance: int,
        seed: int = 0,
        largest_count: int = 4,
        first_distance: int | None = None,
        bar: float = 0.9,
        patience: int | None = None,
        episodes: int = 1024,
    ):
        first_distance = distance if first_distance is None else first_distance
        if largest_count < 1:
            raise ValueError(f"task.largest_count must be at least 1, got {largest_count}")
        if distance < 2 * largest_count + 2:
            needed = 2 * largest_count + 2
            raise ValueError(f"task.distance must be at least {needed} timesteps to hold an episode, got {distance}")
        if not 2 * largest_count + 2 <= first_distance <= distance:
            limits = f"{2 * largest_count + 2} to task.distance={distance}"
            raise ValueError(f"task.first_distance must be {limits} timesteps, got {first_distance}")
        if patience is not None and patience < 1:
            raise ValueError(f"task.patience must be at least 1 feedback, got {patience}; for no limit use null")
        if episodes < 1:
            raise ValueError(f"task.episodes must be at least 1, got {episodes}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.distance, self.seed, self.largest_count = distance, seed, largest_count
        self.first_distance, self.bar, self.patience, self.episodes = first_distance, bar, patience, episodes
        self.stage = first_distance  # length of the training episodes that begin from now on
        self.answered = 0  # length of the training episode last answered
        self.feedbacks = 0  # at this stage

    def stream(self, split: str, batch: int, block: int) -> "CopyStream":
        for key, length in (("distance", self.distance), ("first_distance", self.first_distance)):
            if length % block:
                nearest = math.ceil(length / block) * block
                raise ValueError(f"task.{key} must be a multiple of block={block}, got {length}; use {nearest}")
        if block < self.largest_count + 2:
            raise ValueError(f"block must hold the answer, {self.largest_count + 2} timesteps, got {block}")
        return CopyStream(self, split, batch, block)

    def episode(self, split: str, number: int, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the A's of episodes `number` to `number + count` end (exclusive), and how many they are: (count,) each.

        An episode depends on its number, seed, split and length only, not on how many are drawn together.
        """
        generator = np.random.PCG64([self.seed, SPLITS.index(split), length]).advance(2 * number)
        draw = np.random.Generator(generator).random((count, 2))
        farthest = self.cue(length) - self.largest_count + 1  # every distance from 1 to here, whatever the count
        distance = 1 + (draw[:, 0] * farthest).astype(np.int64)
        return self.cue(length) - distance + 1, 1 + (draw[:, 1] * self.largest_count).astype(np.int64)

    def cue(self, length: int) -> int:
        return length - self.largest_count - 2

    def feedback(self, accuracy: float) -> None:
        """Mean training accuracy of late: lengthens the episodes that begin from now on, once it reaches the bar.

        Nothing is learned from it (nan included) until an episode of the present length has been answered.
        """
        if self.stage == self.distance or self.answered != self.stage or math.isnan(accuracy):
            return
        self.feedbacks += 1
        if accuracy >= self.bar or self.feedbacks == self.patience:
            self.stage, self.feedbacks = min(2 * self.stage, self.distance), 0

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "answered": self.answered, "feedbacks": self.feedbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.answered, self.feedbacks = state["stage"], state["answered"], state["feedbacks"]


class CopyStream:
    """Blocks of episodes, each made from the two numbers a stream that define its episode."""

    def __init__(self, task: Copy, split: str, batch: int, block: int):
        self.task, self.split, self.batch, self.block = task, split, batch, block
        self.number = 0  # of the first stream's episode
        self.time = 0  # within the episode
        self.length = 0  # of the episode

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        train = self.split == "train"
        if not train and self.number >= self.task.episodes:
            raise StopIteration
        if self.time == 0:
            self.length = self.task.stage if train else self.task.distance
        end, count = self.task.episode(self.split, self.number, self.batch, self.length)
        made = self.make(end[:, None], count[:, None])
        self.time += self.block
        if self.time == self.length:
            self.time, self.number = 0, self.number + self.batch
            if train:
                self.task.answered = self.length
        return made

    def make(self, end: np.ndarray, count: np.ndarray) -> Batch:  # (B, 1) each
        cue, time = self.task.cue(self.length), np.arange(self.time, self.time + self.block)  # (T,)
        shown = (time >= end - count) & (time < end)  # (B, T)
        asked = (time >= cue) & (time <= cue + count)  # (B, T): where the next token is A or, at last, the full stop
        tokens = np.where(shown | (time > cue) & asked, A, B)
        tokens[:, time == cue] = CUE
        tokens[time == cue + count + 1] = STOP
        targets = np.where(asked, np.where(time < cue + count, A, STOP), IGNORED)
        distance = np.where(asked, cue - end + 1, 0)
        reach = np.broadcast_to(time, tokens.shape).copy()
        return Batch(*(torch.from_numpy(part) for part in (tokens, targets, reach, distance)))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "time": self.time, "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.time, self.length = state["number"], state["time"], state["length"]
