"""Corridor (section 5.2, figure 4): remember the color of an object down a long corridor, to the door of that color.

The agent starts beside a red or blue object at one end of a corridor. At the other end are a red and a blue door, one
above and one below the last cell. The door of the object's color gives reward 1, the other 0; either ends the episode.

    # r # # # # # # # # # B #
    # @                     #      here: seven cells and more to the right, then down
    # # # # # # # # # # # R #

The paper gives the object, the length U(3, 200), the reward and the four moves. That the wrong door ends the episode,
which side a door is on, and the maximum number of steps are our choice.
"""

import torch
from torch import Tensor

from .gridworld import BLUE, RED, Draws, Gridworld, GridworldEnvs, agent_view


class Corridor(Gridworld):
    """Words of a cell: agent, block, object, door, red, blue; then, if observed, the last action.

    Keys of `episode_info`: success, episode_return, episode_length, truncated, distance (cells of the corridor).

    Args:
        min_length: Lowest number of cells; the shortest way from the first cell through a door takes as many timesteps.
        max_length: Highest number of cells; lengths are uniform from min_length to this.
        random_door_sides: Whether it is drawn which door is above. False: the red one is, a simplification, since the
            object then tells the way, and colors need not be compared.
        max_episode_steps: Highest number of timesteps of an episode (None: 16 plus 4 for each cell).
        initial_max_length: The max_length of the first training episodes (None: `max_length` at once).
        curriculum_growth: Factor by which the training max_length grows.
        curriculum_threshold: Mean success from which it grows.
        curriculum_min_intervals: Minimum number of calls of `update_curriculum` before it grows again.
        eval_max_length: The max_length of valid and test (None: `max_length`); a larger one tests longer corridors
            than those trained on.
        observe_last_action: Whether the agent observes its last action.
        seed: Seed of the random numbers.

    Raises:
        ValueError: if the arguments do not fit each other.
    """

    cell_words = ("agent", "block", "object", "door", "red", "blue")

    def __init__(
        self,
        min_length: int = 3,
        max_length: int = 200,
        random_door_sides: bool = True,
        max_episode_steps: int | None = None,
        initial_max_length: int | None = None,
        curriculum_growth: float = 1.2,
        curriculum_threshold: float = 0.9,
        curriculum_min_intervals: int = 1,
        eval_max_length: int | None = None,
        observe_last_action: bool = False,
        seed: int = 0,
    ):
        initial_max_length = max_length if initial_max_length is None else initial_max_length
        eval_max_length = max_length if eval_max_length is None else eval_max_length
        if min_length < 2:
            raise ValueError(f"task.min_length must be at least 2 cells, for object and doors, got {min_length}")
        for key, length in (("max_length", max_length), ("eval_max_length", eval_max_length)):
            if length < min_length:
                raise ValueError(f"task.{key} must be at least task.min_length={min_length} cells, got {length}")
            if max_episode_steps is not None and max_episode_steps < length:
                limits = f"at least task.{key}={length} timesteps"
                raise ValueError(f"task.max_episode_steps must be {limits}, got {max_episode_steps}")
        if not min_length <= initial_max_length <= max_length:
            limits = f"task.min_length={min_length} to task.max_length={max_length}"
            raise ValueError(f"task.initial_max_length must be {limits} cells, got {initial_max_length}")
        if curriculum_growth <= 1:
            raise ValueError(f"task.curriculum_growth must be more than 1, got {curriculum_growth}")
        super().__init__(
            initial_stage=initial_max_length,
            final_stage=max_length,
            eval_stage=eval_max_length,
            curriculum_threshold=curriculum_threshold,
            curriculum_min_intervals=curriculum_min_intervals,
            observe_last_action=observe_last_action,
            seed=seed,
        )
        self.min_length, self.max_length, self.random_door_sides = min_length, max_length, random_door_sides
        self.max_episode_steps, self.curriculum_growth = max_episode_steps, curriculum_growth
        self.initial_max_length, self.eval_max_length = initial_max_length, eval_max_length

    def create_envs(self, draws: Draws, train: bool) -> GridworldEnvs:
        return CorridorEnvs(self, draws, train)

    def next_stage(self) -> int:
        return max(self.curriculum_stage + 1, int(self.curriculum_stage * self.curriculum_growth))


class CorridorEnvs(GridworldEnvs):
    """Corridors. An episode consists of these, (B,) each.

    length: cells. position: the agent's cell, from 0. object_color. upper_color: that of the upper door.
    max_episode_steps.
    """

    task: Corridor

    def __init__(self, task: Corridor, draws: Draws, train: bool):
        super().__init__(task, draws, train)
        # All views there are: the agent sees how far each end is up to two cells, and the colors at the ends.
        ends = [(left, right) for left in range(3) for right in range(3)]
        colors = [(object_color, upper_color) for object_color in (RED, BLUE) for upper_color in (RED, BLUE)]
        views = [
            agent_view(draw_corridor(left + right + 1, object_color, upper_color), 1, left + 1, self.task.cell_words)
            for left, right in ends
            for object_color, upper_color in colors
        ]
        self.views = torch.stack(views).to(self.device)  # (36, 54)
        self.shift_of = torch.tensor([0, 1, 0, -1], device=self.device)  # cells, by action: up, right, down, left

    def sample_episodes(self) -> dict[str, Tensor]:
        length = self.draws.integers(self.task.min_length, self.stage)
        colors = self.draws.integers(0, 3 if self.task.random_door_sides else 1)
        fixed = self.task.max_episode_steps
        return {
            "length": length,
            "position": self.zeros,
            "object_color": colors & 1,
            "upper_color": colors >> 1,
            "max_episode_steps": 4 * length + 16 if fixed is None else torch.full_like(length, fixed),
        }

    def transition(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        episode, shift = self.episode, self.shift_of.index_select(0, action)
        last_cell = episode.length - 1
        through_door = (episode.position == last_cell) & (shift == 0)
        door_color = episode.upper_color ^ (action >> 1)  # of the door that is up (action 0) or down (action 2)
        success = through_door & (door_color == episode.object_color)
        episode.position = torch.minimum((episode.position + shift).clamp(min=0), last_cell)
        return success.float(), through_door, {"success": success, "distance": episode.length}

    def observation_parts(self) -> list[tuple[Tensor, Tensor]]:
        episode = self.episode
        left, right = episode.position.clamp(max=2), (episode.length - 1 - episode.position).clamp(max=2)
        return [(self.views, 12 * left + 4 * right + 2 * episode.object_color + episode.upper_color)]

    def ascii_map(self, env: int) -> tuple[list[str], int, int, str]:
        episode = self.episode
        values = (episode.length, episode.position, episode.object_color, episode.upper_color)
        length, position, object_color, upper_color = (int(value[env]) for value in values)
        return draw_corridor(length, object_color, upper_color), 1, position + 1, f"corridor of {length} cells"


def draw_corridor(length: int, object_color: int, upper_color: int) -> list[str]:
    """The rows of a corridor, walls included."""
    above, below = list("#" * (length + 2)), list("#" * (length + 2))
    above[length], below[length] = "RB" if upper_color == RED else "BR"
    above[1] = "rb"[object_color]  # replaces a door only in a corridor of one cell, and none is so short
    return ["".join(above), "#" + " " * length + "#", "".join(below)]
