"""Collision (section 5.2, table 3): two particles drift through a grid; where did those of these colors last meet?

Each particle flies straight until its next move would leave the grid, then draws a new velocity; now and then it
changes its color. A collision is both particles in one cell, which changes no motion. Every timestep asks about a pair
of colors: the answer is the quadrant in which particles of these colors last met. It is scored if they ever have.

    . 1 | . .      timestep   x1 y1   x2 y2   colors    question   answer
    . . | . .         40       1  0    2  2     r g       r g         -       no collision yet: not scored
    ----+----         41       2  1    2  1     r g       b b         -
    . . | 2 .         42       3  2    2  0     r b       r g         1       met one timestep ago, top right
    . . | . .

The paper's form has eight tokens per timestep and asks for the answer at the last of them. The merged form is a
simplification: one timestep of eight fields, whose embeddings are summed. Since a timestep does not attend to itself,
its question is the one of the timestep before.

The paper leaves the following open; these are our choices. Each of the eight fields has tokens of its own. A collision
of the present timestep counts. Questions that are not about the last collision, and all before the first one, are about
colors drawn uniformly. The data are many short simulations rather than a single long one, and memories do not reach
from one simulation into the next.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .base import IGNORE_INDEX, SPLITS, Batch, Task
from .data_cache import cached_array

TIMESTEPS_AT_ONCE = 1_000_000  # generated in one piece
SAMPLE_SIMULATIONS, SAMPLE_LENGTH = 16, 2_000  # whose content tells versions of the generator apart


class Collision(Task):
    """Simulations of equal length, generated once for each split and seed and kept in the cache folder.

    Batches are (B, T) tokens with T a multiple of 8, or (B, T, 8) with `merge_fields`. `answer_distance` reaches from
    the question back to the same field of the timestep of the collision.

    Args:
        grid_size: Width and height in cells; even, at most 256.
        num_colors: Number of colors, at most 15.
        color_change_prob: Chance that a particle draws a new color, per timestep.
        last_collision_question_fraction: Share of the questions that ask about the colors of the last collision.
        velocity_std: Standard deviation of the velocity along each axis, in cells per timestep.
        timesteps: Timesteps of all training simulations together.
        eval_timesteps: Timesteps of valid and of test each.
        num_simulations: Number of training simulations, a multiple of the batch size B: every stream goes through
            num_simulations / B of them. Short simulations only have collisions nearby to ask about.
        eval_simulations: Number of simulations of valid and of test each, a multiple of the batch size of evaluation.
        merge_fields: Whether a timestep is one token instead of eight.
        seed: Seed of the random numbers.

    Raises:
        ValueError: if the arguments do not fit each other or, in `stream`, the batch or block size.
    """

    num_classes = 4
    metric = "error"
    scoring = "token"
    question = slice(6, 8)  # the fields of a timestep that ask

    def __init__(
        self,
        grid_size: int = 16,
        num_colors: int = 5,
        color_change_prob: float = 0.05,
        last_collision_question_fraction: float = 0.4,
        velocity_std: float = 0.5,
        timesteps: int = 50_000_000,
        eval_timesteps: int = 5_000_000,
        num_simulations: int = 512,
        eval_simulations: int = 64,
        merge_fields: bool = False,
        seed: int = 0,
    ):
        if grid_size % 2 or not 2 <= grid_size <= 256:
            raise ValueError(
                f"task.grid_size must be even, to have quadrants, and from 2 to 256 cells, got {grid_size}"
            )
        if not 1 <= num_colors <= 15:
            raise ValueError(f"task.num_colors must be from 1 to 15, got {num_colors}")
        for key, probability in (
            ("color_change_prob", color_change_prob),
            ("last_collision_question_fraction", last_collision_question_fraction),
        ):
            if not 0 <= probability <= 1:
                raise ValueError(f"task.{key} must be from 0 to 1, got {probability}")
        if not 0 < velocity_std <= grid_size:
            limits = f"above 0 and at most task.grid_size={grid_size} cells per timestep"
            raise ValueError(f"task.velocity_std must be {limits}, got {velocity_std}")
        for key, number, total_key, total in (
            ("num_simulations", num_simulations, "timesteps", timesteps),
            ("eval_simulations", eval_simulations, "eval_timesteps", eval_timesteps),
        ):
            if not 1 <= number <= total:
                raise ValueError(f"task.{key} must be from 1 to task.{total_key}={total}, got {number}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.grid_size, self.num_colors, self.color_change_prob = grid_size, num_colors, color_change_prob
        self.last_collision_question_fraction, self.velocity_std = last_collision_question_fraction, velocity_std
        self.timesteps, self.eval_timesteps = timesteps, eval_timesteps
        self.num_simulations, self.eval_simulations = num_simulations, eval_simulations
        self.merge_fields, self.seed = merge_fields, seed
        # Number of values of each field: x, y of particle 1 and of particle 2; their colors; the colors asked about.
        self.field_sizes = [grid_size] * 4 + [num_colors] * 4
        self.vocab_size = sum(self.field_sizes)
        self.cache_name = f"collision-grid{grid_size}-colors{num_colors}-change{color_change_prob}"
        self.cache_name += f"-last{last_collision_question_fraction}-velocity{velocity_std}"

    @cached_property
    def generator_hash(self) -> str:
        """A hash of a sample, part of the name of the cached data: another version of the generator makes others."""
        sample = self.simulate(np.random.default_rng(0), SAMPLE_SIMULATIONS, SAMPLE_LENGTH)  # the same for all seeds
        return hashlib.sha256(sample.tobytes() + str(TIMESTEPS_AT_ONCE).encode()).hexdigest()[:8]

    @cached_property
    def data_info(self) -> dict[str, str]:  # type: ignore[override]  # of the finished task
        return {"generator": self.generator_hash}

    @property
    def first_tokens(self) -> np.ndarray:  # (fields,): the token for value 0 of each field
        return np.cumsum([0, *self.field_sizes[:-1]])

    @property
    def record(self) -> np.dtype:
        """What is stored of a timestep: its fields, the answer (-1: none) and the distance of the collision."""
        return np.dtype([("fields", "u1", len(self.field_sizes)), ("answer", "i1"), ("distance", "<i4")])

    def stream(self, split: str, batch_size: int, block_size: int) -> "CollisionStream":
        key = "num_simulations" if split == "train" else "eval_simulations"
        if getattr(self, key) % batch_size:
            number = getattr(self, key)
            raise ValueError(f"task.{key} must be a multiple of the batch_size={batch_size}, got {number}")
        if not self.merge_fields and block_size % len(self.field_sizes):
            tokens = f"{len(self.field_sizes)} tokens of a timestep"
            raise ValueError(f"block_size must be a multiple of the {tokens}, got {block_size}")
        return CollisionStream(self, split, batch_size, block_size)

    def records(self, split: str) -> np.ndarray:
        """The simulations of a split: (simulations, timesteps of each), of type `record`."""
        train = split == "train"
        simulations = self.num_simulations if train else self.eval_simulations
        length = (self.timesteps if train else self.eval_timesteps) // simulations
        at_once = max(1, TIMESTEPS_AT_ONCE // length)

        def pieces() -> Iterator[np.ndarray]:
            rng = np.random.default_rng([self.seed, SPLITS.index(split)])
            for first in range(0, simulations, at_once):
                yield self.simulate(rng, min(at_once, simulations - first), length)

        name = f"{self.cache_name}-{split}-{simulations}x{length}-seed{self.seed}-{self.generator_hash}"
        return cached_array(name, (simulations, length), self.record, pieces)

    def simulate(self, rng: np.random.Generator, simulations: int, length: int) -> np.ndarray:
        """Generate (simulations, length) records."""
        cells = self.simulate_motion(rng, 2 * simulations, length).reshape(simulations, 2, length, 2)
        colors = self.sample_colors(rng, 2 * simulations, length).reshape(simulations, 2, length)
        pair = colors[:, 0] * self.num_colors + colors[:, 1]  # (simulations, length)
        collided = (cells[:, 0] == cells[:, 1]).all(-1)  # (simulations, length)

        # A question is about the colors of the last collision, if there has been one, or about random colors.
        time = np.arange(length)
        last_collision = np.maximum.accumulate(np.where(collided, time, -1), axis=1)
        about_last = rng.random(collided.shape, np.float32) < self.last_collision_question_fraction
        about_last &= last_collision >= 0
        question_pair = rng.integers(self.num_colors**2, size=collided.shape, dtype=np.uint8)
        question_pair = np.where(about_last, np.take_along_axis(pair, last_collision, axis=1), question_pair)

        # Number all (simulation, pair, time) in this order; the collision asked about is then the last one that is not
        # after the question. It counts if it is of the same simulation and pair.
        simulation = np.arange(simulations)[:, None] * self.num_colors**2
        collisions = np.sort(((simulation + pair) * length + time)[collided])
        questions = (simulation + question_pair) * length + time
        index = np.searchsorted(collisions, questions, side="right") - 1
        distance = questions - np.append(collisions, -1)[index]  # index is -1 before the first collision
        has_answer = distance <= time

        records = np.empty(collided.shape, self.record)
        fields = records["fields"]
        fields[..., 0:2], fields[..., 2:4] = cells[:, 0], cells[:, 1]
        fields[..., 4], fields[..., 5] = colors[:, 0], colors[:, 1]
        fields[..., 6], fields[..., 7] = np.divmod(question_pair, self.num_colors)
        quadrant = np.take_along_axis(self.quadrants(cells[:, 0]), np.where(has_answer, time - distance, 0), axis=1)
        records["answer"], records["distance"] = np.where(has_answer, quadrant, -1), np.where(has_answer, distance, 0)
        return records

    def quadrants(self, cells: np.ndarray) -> np.ndarray:
        """0: top left, 1: top right, 2: bottom left, 3: bottom right. cells: (..., 2)."""
        right, lower = np.moveaxis(cells >= self.grid_size // 2, -1, 0)
        return right + 2 * lower

    def simulate_motion(self, rng: np.random.Generator, particles: int, length: int) -> np.ndarray:
        """Generate the cells of independent particles: (particles, length, 2).

        A flight with one velocity lasts as many moves as stay within the grid. If there are none, the velocity is
        drawn again.
        """
        position = rng.random((particles, 2)) * self.grid_size
        moved = np.zeros(particles, int)  # moves so far
        flights = []
        while moved.min() < length:
            velocity = rng.normal(0, self.velocity_std, (particles, 2))
            room = np.where(velocity > 0, self.grid_size - position, position)  # to the wall ahead
            moves = np.minimum(room / np.abs(velocity), length).min(-1).astype(int)
            flights.append((moved, position, velocity, np.minimum(moves, length - moved)))
            position = position + moves[:, None] * velocity
            position = np.clip(position, 0, np.nextafter(self.grid_size, 0))  # rounding errors
            moved = np.minimum(moved + moves, length)
        starts, positions, velocities, moves = (np.stack(part, axis=1) for part in zip(*flights, strict=True))
        flight = np.repeat(np.arange(starts.size), moves.ravel())  # (particles * length,)
        elapsed = np.tile(np.arange(length), particles) - starts.ravel()[flight]
        cells = positions.reshape(-1, 2)[flight] + elapsed[:, None] * velocities.reshape(-1, 2)[flight]
        return cells.clip(0, self.grid_size - 1).astype(np.uint8).reshape(particles, length, 2)

    def sample_colors(self, rng: np.random.Generator, particles: int, length: int) -> np.ndarray:
        """Generate the colors of independent particles: (particles, length)."""
        changes = rng.random((particles, length), np.float32) < self.color_change_prob
        changes[:, 0] = True
        colors = rng.integers(self.num_colors, size=changes.sum(), dtype=np.uint8)
        return colors[np.cumsum(changes) - 1].reshape(particles, length)


class CollisionStream:
    """Stream b reads num_simulations / batch_size simulations one after the other; training repeats them endlessly."""

    def __init__(self, task: Collision, split: str, batch_size: int, block_size: int):
        self.task, self.endless = task, split == "train"
        records = task.records(split)
        self.simulation_length = records.shape[1]
        self.records = records.reshape(batch_size, -1)
        self.steps = block_size if task.merge_fields else block_size // len(task.field_sizes)  # timesteps of a block
        self.time = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        total = self.records.shape[1]
        if not self.endless and self.time >= total:
            raise StopIteration
        time = np.arange(self.time, self.time + self.steps)  # (steps,)
        records = self.records[:, time % total]  # (B, steps)
        self.time += self.steps
        if self.task.merge_fields:
            previous, question = self.records[:, (time - 1) % total], self.task.question  # (B, steps)
            records["fields"][..., question] = previous["fields"][..., question]
            first = time % self.simulation_length == 0  # it has no timestep before it
            records["answer"] = np.where(first, -1, previous["answer"])
            records["distance"] = previous["distance"] + 1
        tokens = torch.from_numpy(records["fields"] + self.task.first_tokens)  # (B, steps, fields)
        answer = torch.from_numpy(records["answer"].astype(np.int64))  # (B, steps)
        distance = torch.from_numpy(records["distance"].astype(np.int64))  # (B, steps)
        answer[answer < 0] = IGNORE_INDEX
        if not self.endless:
            answer[:, time >= total] = IGNORE_INDEX  # padding of the last block
        reach = torch.from_numpy(time % total % self.simulation_length).expand(answer.shape)
        if self.task.merge_fields:
            return Batch(tokens, answer, reach.contiguous(), distance)

        fields = tokens.shape[-1]
        targets, answer_distance = torch.full_like(tokens, IGNORE_INDEX), torch.zeros_like(tokens)
        targets[..., -1], answer_distance[..., -1] = answer, distance * fields
        reach = reach[..., None] * fields + torch.arange(fields)
        return Batch(tokens.flatten(1), targets.flatten(1), reach.flatten(1), answer_distance.flatten(1))

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time = state["time"]
