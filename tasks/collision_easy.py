"""Collision without colours: two particles drift through a grid; where did they last meet, or the last three times?

The worlds are collision.py's. At every timestep one of two questions is asked, drawn at random. `?` is about the
quadrant of the last collision, `!` about the label that a fixed table gives to the quadrants of the last three; either
is scored where there have been that many.

    . 1 | . .      timestep   x1 y1   x2 y2   question   answer
    . . | . .         40       1  0    2  2      ?         -       not met yet: nothing is scored
    ----+----         41       2  1    2  1      ?         1       met now, top right
    . . | 2 .         42       3  2    2  0      !         -       one collision, not yet three
    . . | . .

Unmerged, a timestep is five tokens. The paper says no more of the second question than "the label mapping of the last 3
collisions", and nothing of the questions' shares: the table, with each label as often as any other, and the shares are
our choices; so are those named in collision.py.
"""

import numpy as np

from .collision import Collision

# Its label of three quadrants, the last collision's first: an arbitrary table, from 4 x 4 x 4 combinations to 4 labels.
TABLE = "0030031022222233" "3110213120121303" "0222302013123001" "0313311221100133"
LABELS = np.array(list(TABLE), np.int8).reshape(4, 4, 4)
ASKED = (1, 3)  # collisions that a question is about


class CollisionEasy(Collision):
    """`worlds` simulations of equal length, made once for each split and seed, and kept in the cache folder.

    mapping_questions         share of the questions that are about the last three collisions

    The others, the batches and what is raised are `Collision`'s, with five tokens a timestep in place of eight.
    `distance` goes back to the earliest collision that the answer needs.
    """

    question = slice(4, 5)

    def __init__(
        self,
        grid: int = 16,
        mapping_questions: float = 0.5,
        speed: float = 0.5,
        timesteps: int = 50_000_000,
        evaluation_timesteps: int = 5_000_000,
        worlds: int = 512,
        evaluation_worlds: int = 64,
        merged: bool = False,
        seed: int = 0,
    ):
        if not 0 <= mapping_questions <= 1:
            raise ValueError(f"task.mapping_questions is a share and must be from 0 to 1, got {mapping_questions}")
        super().__init__(
            grid=grid,
            speed=speed,
            timesteps=timesteps,
            evaluation_timesteps=evaluation_timesteps,
            worlds=worlds,
            evaluation_worlds=evaluation_worlds,
            merged=merged,
            seed=seed,
        )
        self.mapping_questions = mapping_questions
        self.fields = [grid] * 4 + [len(ASKED)]  # x, y of particle 1; x, y of particle 2; the question
        self.name = f"collision_easy-grid{grid}-mapping{mapping_questions}-speed{speed}"

    def simulate(self, generator: np.random.Generator, worlds: int, length: int) -> np.ndarray:
        """(worlds, length) moments."""
        cells = self.fly(generator, 2 * worlds, length).reshape(worlds, 2, length, 2)
        met = (cells[:, 0] == cells[:, 1]).all(-1)  # (worlds, length)
        question = (generator.random(met.shape, np.float32) < self.mapping_questions).astype(np.uint8)

        # The collisions of all worlds stand in one row, by world and time; last[k] is the place of the k-th last one.
        collisions = np.append(np.flatnonzero(met), 0)  # the last is none: it keeps the row from being empty
        place = np.cumsum(met).reshape(met.shape)  # how many so far, in all worlds up to this one
        count = np.cumsum(met, axis=1)
        last = (place - np.arange(1, 1 + max(ASKED))[:, None, None]).clip(0)  # (3, worlds, length)
        right, lower = np.moveaxis(cells[:, 0] >= self.grid // 2, -1, 0)  # (worlds, length) each
        quadrants = (right + 2 * lower).flat[collisions][last]  # (3, worlds, length)
        answer = np.where(question, LABELS[tuple(quadrants)], quadrants[0])
        since = np.arange(met.size).reshape(met.shape) - collisions[np.where(question, last[2], last[0])]
        known = count >= np.take(ASKED, question)

        moments = np.empty(met.shape, self.moment)
        fields = moments["fields"]
        fields[..., 0:2], fields[..., 2:4], fields[..., 4] = cells[:, 0], cells[:, 1], question
        moments["answer"], moments["ago"] = np.where(known, answer, -1), np.where(known, since, 0)
        return moments
