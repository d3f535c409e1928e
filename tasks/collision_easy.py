"""Collision without colors (section A.1.4, table 6): where did two particles last meet, or meet the last three times?

The motion is that of collision.py. Every timestep asks one of two questions, drawn at random. `?` asks for the quadrant
of the last collision, `!` for the label that a fixed table gives to the quadrants of the last three. Either is scored
if there have been that many collisions.

    . 1 | . .      timestep   x1 y1   x2 y2   question   answer
    . . | . .         40       1  0    2  2      ?         -       no collision yet: not scored
    ----+----         41       2  1    2  1      ?         1       a collision now, top right
    . . | 2 .         42       3  2    2  0      !         -       one collision, not yet three
    . . | . .

The paper's form has five tokens per timestep. Of the second question it says only "the label mapping of the last 3
collisions", and nothing of the shares of the two. These are our choices: the table, in which each label is as frequent
as any other, the shares, and those named in collision.py.
"""

import numpy as np

from .collision import Collision

# The label of three quadrants, that of the last collision first: an arbitrary table from 4 x 4 x 4 to 4 labels.
TABLE = "0030031022222233311021312012130302223020131230010313311221100133"
LABELS = np.array(list(TABLE), np.int8).reshape(4, 4, 4)
COLLISIONS_ASKED = (1, 3)  # by question


class CollisionEasy(Collision):
    """Simulations of equal length, generated once for each split and seed and kept in the cache folder.

    `answer_distance` reaches back to the earliest collision that the answer depends on.

    Args:
        mapping_question_fraction: Share of the questions that ask about the last three collisions.

    The other arguments, the batches and the errors are those of `Collision`, with five tokens per timestep.
    """

    question = slice(4, 5)

    def __init__(
        self,
        grid_size: int = 16,
        mapping_question_fraction: float = 0.5,
        velocity_std: float = 0.5,
        timesteps: int = 50_000_000,
        eval_timesteps: int = 5_000_000,
        num_simulations: int = 512,
        eval_simulations: int = 64,
        merge_fields: bool = False,
        seed: int = 0,
    ):
        if not 0 <= mapping_question_fraction <= 1:
            raise ValueError(f"task.mapping_question_fraction must be from 0 to 1, got {mapping_question_fraction}")
        super().__init__(
            grid_size=grid_size,
            velocity_std=velocity_std,
            timesteps=timesteps,
            eval_timesteps=eval_timesteps,
            num_simulations=num_simulations,
            eval_simulations=eval_simulations,
            merge_fields=merge_fields,
            seed=seed,
        )
        self.mapping_question_fraction = mapping_question_fraction
        # Number of values of each field: x, y of particle 1 and of particle 2; the question.
        self.field_sizes = [grid_size] * 4 + [len(COLLISIONS_ASKED)]
        self.vocab_size = sum(self.field_sizes)
        self.cache_name = f"collision_easy-grid{grid_size}-mapping{mapping_question_fraction}-velocity{velocity_std}"

    def simulate(self, rng: np.random.Generator, simulations: int, length: int) -> np.ndarray:
        """Generate (simulations, length) records."""
        cells = self.simulate_motion(rng, 2 * simulations, length).reshape(simulations, 2, length, 2)
        collided = (cells[:, 0] == cells[:, 1]).all(-1)  # (simulations, length)
        question = (rng.random(collided.shape, np.float32) < self.mapping_question_fraction).astype(np.uint8)

        # All collisions in one array, by simulation and time; last[k] is the index in it of the k-th last collision.
        collisions = np.append(np.flatnonzero(collided), 0)  # the extra element keeps the array from being empty
        total = np.cumsum(collided).reshape(collided.shape)  # collisions so far, of this and all earlier simulations
        count = np.cumsum(collided, axis=1)  # collisions so far, of this simulation
        last = (total - np.arange(1, 1 + max(COLLISIONS_ASKED))[:, None, None]).clip(0)  # (3, simulations, length)
        quadrants = self.quadrants(cells[:, 0]).flat[collisions][last]  # (3, simulations, length)
        answer = np.where(question, LABELS[tuple(quadrants)], quadrants[0])
        distance = np.arange(collided.size).reshape(collided.shape)
        distance = distance - collisions[np.where(question, last[2], last[0])]
        has_answer = count >= np.take(COLLISIONS_ASKED, question)

        records = np.empty(collided.shape, self.record)
        fields = records["fields"]
        fields[..., 0:2], fields[..., 2:4], fields[..., 4] = cells[:, 0], cells[:, 1], question
        records["answer"], records["distance"] = np.where(has_answer, answer, -1), np.where(has_answer, distance, 0)
        return records
