"""Collision: two particles drift through a grid; where did those of these colours last meet?

Each particle flies straight until its next move would leave the grid, then turns at random, and now and then changes
its colour. A collision is both in one cell, which stops nobody. At every timestep the model is asked about a pair of
colours and must name the quadrant in which particles of these colours last met; it is scored where they ever have.

    . 1 | . .      timestep   x1 y1   x2 y2   colours   question   answer
    . . | . .         40       1  0    2  2     r g       r g         -       not met yet: nothing is scored
    ----+----         41       2  1    2  1     r g       b b         -
    . . | 2 .         42       3  2    2  0     r b       r g         1       met one timestep ago, top right
    . . | . .

The unmerged form is the paper's, eight tokens a timestep, the answer asked for at the last of them. The merged form is
a simplification: one timestep of eight fields, whose embeddings are summed. Since a timestep does not attend to itself,
its question is the one of the timestep before.

Our choices, since the paper leaves them open: a vocabulary in which each of the eight has numbers of its own; a
collision of this very timestep counts; questions not about the last collision are about colours drawn uniformly, as are
all before the first one; the data are many shorter worlds rather than a single one, and none is seen from another.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .download import keep_array
from .stream import IGNORED, SPLITS, Batch

PIECE = 1_000_000  # timesteps generated at once


class Collision:
    """`worlds` simulations of equal length, made once for each split and seed, and kept in the cache folder.

    grid                      width and height in cells (even, at most 256)
    colours                   of a particle (at most 15)
    colour_change             chance that a particle draws a new colour, a timestep
    last_collision_questions  share of the questions that are about the last collision's colours
    speed                     standard deviation of the velocity along each axis, in cells a timestep
    timesteps                 for training, in all worlds
    evaluation_timesteps      for valid and for test each
    worlds, evaluation_worlds each a multiple of the batch: a stream goes through worlds / batch of them; worlds of few
                              timesteps ask about near collisions only, so few and long ones are for evaluation
    merged                    one token a timestep instead of eight

    Batches are (B, T, 8) tokens where merged, else (B, T) with T a multiple of 8. `distance` goes from the question
    back to the same token of the collision's timestep.
    Raises ValueError where these do not fit each other, or, in `stream`, the batch and the block.
    """

    classes = 4
    measure = "error"
    answer = "token"
    question = slice(6, 8)  # which of a timestep's fields

    def __init__(
        self,
        grid: int = 16,
        colours: int = 5,
        colour_change: float = 0.05,
        last_collision_questions: float = 0.4,
        speed: float = 0.5,
        timesteps: int = 50_000_000,
        evaluation_timesteps: int = 5_000_000,
        worlds: int = 512,
        evaluation_worlds: int = 64,
        merged: bool = False,
        seed: int = 0,
    ):
        if grid % 2 or not 2 <= grid <= 256:
            raise ValueError(f"task.grid must be even, to have quadrants, and from 2 to 256 cells, got {grid}")
        if not 1 <= colours <= 15:
            raise ValueError(f"task.colours must be from 1 to 15, got {colours}")
        for key, chance in (("colour_change", colour_change), ("last_collision_questions", last_collision_questions)):
            if not 0 <= chance <= 1:
                raise ValueError(f"task.{key} is a chance and must be from 0 to 1, got {chance}")
        if not 0 < speed <= grid:
            raise ValueError(f"task.speed must be above 0 and at most task.grid={grid} cells a timestep, got {speed}")
        training, evaluation = ("", worlds, timesteps), ("evaluation_", evaluation_worlds, evaluation_timesteps)
        for prefix, count, amount in (training, evaluation):
            if not 1 <= count <= amount:
                limits = f"from 1 to task.{prefix}timesteps={amount}"
                raise ValueError(f"task.{prefix}worlds must be {limits}, got {count}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.grid, self.colours, self.colour_change = grid, colours, colour_change
        self.last_collision_questions, self.speed = last_collision_questions, speed
        self.timesteps, self.evaluation_timesteps = timesteps, evaluation_timesteps
        self.worlds, self.evaluation_worlds = worlds, evaluation_worlds
        self.merged, self.seed = merged, seed
        # x, y of particle 1; x, y of particle 2; their colours; the colours asked about
        self.fields = [grid] * 4 + [colours] * 4  # how many numbers each knows
        self.name = f"collision-grid{grid}-colours{colours}-change{colour_change}"
        self.name += f"-last{last_collision_questions}-speed{speed}"

    @property
    def vocabulary(self) -> int:
        return sum(self.fields)

    @property
    def first_tokens(self) -> np.ndarray:  # (fields,): each field's token for 0
        return np.cumsum([0, *self.fields[:-1]])

    @property
    def moment(self) -> np.dtype:
        return np.dtype([("fields", "u1", len(self.fields)), ("answer", "i1"), ("ago", "<i4")])  # answer -1: none

    def stream(self, split: str, batch: int, block: int) -> "CollisionStream":
        key, worlds = ("worlds", self.worlds) if split == "train" else ("evaluation_worlds", self.evaluation_worlds)
        if worlds % batch:
            raise ValueError(f"task.{key} must be a multiple of its batch={batch}, got {worlds}")
        if not self.merged and block % len(self.fields):
            raise ValueError(f"block must be a multiple of the {len(self.fields)} tokens a timestep, got {block}")
        return CollisionStream(self, split, batch, block)

    def moments(self, split: str) -> np.ndarray:
        """The worlds of a split: (worlds, timesteps of each), of type `moment`."""
        train = split == "train"
        worlds = self.worlds if train else self.evaluation_worlds
        length = (self.timesteps if train else self.evaluation_timesteps) // worlds
        together = max(1, PIECE // length)

        def pieces() -> Iterator[np.ndarray]:
            generator = np.random.default_rng([self.seed, SPLITS.index(split)])
            for first in range(0, worlds, together):
                yield self.simulate(generator, min(together, worlds - first), length)

        name = f"{self.name}-{split}-{worlds}x{length}-seed{self.seed}"
        return keep_array(name, (worlds, length), self.moment, pieces)

    def simulate(self, generator: np.random.Generator, worlds: int, length: int) -> np.ndarray:
        """(worlds, length) moments."""
        cells = self.fly(generator, 2 * worlds, length).reshape(worlds, 2, length, 2)
        colours = self.paint(generator, 2 * worlds, length).reshape(worlds, 2, length)
        pair = colours[:, 0] * self.colours + colours[:, 1]  # (worlds, length)
        met = (cells[:, 0] == cells[:, 1]).all(-1)  # (worlds, length)

        # Most of a question's colours are drawn, the others are those of the last collision, where there was one.
        time = np.arange(length)
        last = np.maximum.accumulate(np.where(met, time, -1), axis=1)
        about_last = (generator.random(met.shape, np.float32) < self.last_collision_questions) & (last >= 0)
        asked = generator.integers(self.colours**2, size=met.shape, dtype=np.uint8)
        asked = np.where(about_last, np.take_along_axis(pair, last, axis=1), asked)

        # Sorted by world, pair and time, the collision asked about is the one before or at the question.
        world = np.arange(worlds)[:, None] * self.colours**2
        collisions = np.sort(((world + pair) * length + time)[met])
        questions = (world + asked) * length + time
        found = np.searchsorted(collisions, questions, side="right") - 1
        ago = questions - np.append(collisions, -1)[found]  # before the first collision, found is -1
        known = ago <= time  # or it is another world's or pair's

        moments = np.empty(met.shape, self.moment)
        fields = moments["fields"]
        fields[..., 0:2], fields[..., 2:4] = cells[:, 0], cells[:, 1]
        fields[..., 4], fields[..., 5] = colours[:, 0], colours[:, 1]
        fields[..., 6], fields[..., 7] = np.divmod(asked, self.colours)
        right, lower = np.moveaxis(cells[:, 0] >= self.grid // 2, -1, 0)  # (worlds, length) each
        quadrant = np.take_along_axis(right + 2 * lower, np.where(known, time - ago, 0), axis=1)
        moments["answer"], moments["ago"] = np.where(known, quadrant, -1), np.where(known, ago, 0)
        return moments

    def fly(self, generator: np.random.Generator, particles: int, length: int) -> np.ndarray:
        """The cells of independent particles: (particles, length, 2).

        A flight lasts for as many moves as stay within the grid. One of none is a velocity to be redrawn.
        """
        place = generator.random((particles, 2)) * self.grid
        flown = np.zeros(particles, int)
        flights = []
        while flown.min() < length:
            velocity = generator.normal(0, self.speed, (particles, 2))
            room = np.where(velocity > 0, self.grid - place, place)
            moves = np.minimum(room / np.abs(velocity), length).min(-1).astype(int)
            flights.append((flown, place, velocity, np.minimum(moves, length - flown)))
            place = np.clip(place + moves[:, None] * velocity, 0, np.nextafter(self.grid, 0))  # rounding errors
            flown = np.minimum(flown + moves, length)
        start, places, velocities, moves = (np.stack(part, axis=1) for part in zip(*flights, strict=True))
        flight = np.repeat(np.arange(start.size), moves.ravel())  # (particles * length,)
        since = np.tile(np.arange(length), particles) - start.ravel()[flight]
        cells = places.reshape(-1, 2)[flight] + since[:, None] * velocities.reshape(-1, 2)[flight]
        return cells.clip(0, self.grid - 1).astype(np.uint8).reshape(particles, length, 2)

    def paint(self, generator: np.random.Generator, particles: int, length: int) -> np.ndarray:
        """The colours of independent particles: (particles, length)."""
        changes = generator.random((particles, length), np.float32) < self.colour_change
        changes[:, 0] = True
        drawn = generator.integers(self.colours, size=changes.sum(), dtype=np.uint8)
        return drawn[np.cumsum(changes) - 1].reshape(particles, length)


class CollisionStream:
    """Stream b goes through worlds b * worlds / batch and on, one after the other; in training, over and over."""

    def __init__(self, task: Collision, split: str, batch: int, block: int):
        self.task, self.endless = task, split == "train"
        moments = task.moments(split)
        self.length = moments.shape[1]  # of a world
        self.moments = moments.reshape(batch, -1)
        self.steps = block if task.merged else block // len(task.fields)  # timesteps a block
        self.time = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        total = self.moments.shape[1]
        if not self.endless and self.time >= total:
            raise StopIteration
        time = np.arange(self.time, self.time + self.steps)  # (steps,)
        moments = self.moments[:, time % total]  # (B, steps)
        self.time += self.steps
        if self.task.merged:
            asked = self.moments[:, (time - 1) % total]  # (B, steps)
            moments["fields"][..., self.task.question] = asked["fields"][..., self.task.question]
            moments["answer"] = np.where(time % self.length, asked["answer"], -1)  # none at a world's first
            moments["ago"] = asked["ago"] + 1
        tokens = torch.from_numpy(moments["fields"] + self.task.first_tokens)  # (B, steps, fields)
        answer, ago = (torch.from_numpy(moments[name].astype(np.int64)) for name in ("answer", "ago"))  # (B, steps)
        answer[answer < 0] = IGNORED
        if not self.endless:
            answer[:, time >= total] = IGNORED  # the last block is filled up
        reach = torch.from_numpy(time % total % self.length).expand(answer.shape)
        if self.task.merged:
            return Batch(tokens, answer, reach.contiguous(), ago)

        fields = tokens.shape[-1]
        targets, distance = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
        targets[..., -1], distance[..., -1] = answer, ago * fields
        reach = reach[..., None] * fields + torch.arange(fields)
        return Batch(tokens.flatten(1), targets.flatten(1), reach.flatten(1), distance.flatten(1))

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time = state["time"]
