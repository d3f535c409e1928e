"""Corridor (figure 4, section 5.2): remember the object's colour down a long corridor, to its door of that colour.

The agent begins beside a red or blue object, at one end of a corridor. At the other end are a red and a blue door, one
above and one below the last cell. Through the door of the object's colour it gains 1, through the other 0: either way
the episode ends.

    # r # # # # # # # # # B #
    # @                     #      here: seven cells and more to the right, then down
    # # # # # # # # # # # R #

The paper gives the object, the length U(3, 200), the reward and the moves. That the wrong door ends the episode, which
side a door is on, and the time limit are our choice.
"""

import torch
from torch import Tensor

from .gridworld import BLUE, RED, Gridworld, Worlds, view


class Corridor(Gridworld):
    """Words of a cell: agent, block, object, door, red, blue; then, on request, the last action.

    shortest, longest   length in cells, uniform between these; from the first cell the door takes as many timesteps
    random_sides        whether the doors' sides are drawn; if not, red is above: a simplification, as then the object
                        alone says where to go, and no colours need be matched
    time_limit          timesteps (None: 16, and 4 for each cell)
    first_longest       `longest` of the first training episodes (None: `longest` at once)
    growth, bar, wait   `longest` is multiplied by growth when the mean success reaches bar, `wait` feedbacks apart
    evaluation_longest  `longest` of valid and test (None: `longest`): larger, it asks for more than was trained on
    last_action         whether the agent is told its last action

    Figures in `Worlds.ended`: success, return, length, late, distance (cells of the corridor).
    Raises ValueError where these do not fit each other.
    """

    words = ("agent", "block", "object", "door", "red", "blue")

    def __init__(
        self,
        shortest: int = 3,
        longest: int = 200,
        random_sides: bool = True,
        time_limit: int | None = None,
        first_longest: int | None = None,
        growth: float = 1.2,
        bar: float = 0.9,
        wait: int = 1,
        evaluation_longest: int | None = None,
        last_action: bool = False,
        seed: int = 0,
    ):
        first_longest = longest if first_longest is None else first_longest
        evaluation_longest = longest if evaluation_longest is None else evaluation_longest
        if shortest < 2:
            raise ValueError(f"task.shortest must be at least 2 cells, for object and doors, got {shortest}")
        for key, length in (("longest", longest), ("evaluation_longest", evaluation_longest)):
            if length < shortest:
                raise ValueError(f"task.{key} must be at least task.shortest={shortest} cells, got {length}")
            if time_limit is not None and time_limit < length:
                raise ValueError(f"task.time_limit must be at least task.{key}={length} timesteps, got {time_limit}")
        if not shortest <= first_longest <= longest:
            limits = f"task.shortest={shortest} to task.longest={longest}"
            raise ValueError(f"task.first_longest must be {limits} cells, got {first_longest}")
        if growth <= 1:
            raise ValueError(f"task.growth must be more than 1, got {growth}")
        super().__init__(first_longest, longest, evaluation_longest, bar, wait, last_action, seed)
        self.shortest, self.random_sides, self.time_limit, self.growth = shortest, random_sides, time_limit, growth

    def make(self, environments: int, generator: torch.Generator, train: bool) -> Worlds:
        return CorridorWorlds(self, environments, generator, train)

    def harder(self) -> int:
        return max(self.stage + 1, int(self.stage * self.growth))


class CorridorWorlds(Worlds):
    """Of an episode, (B,) each: length, place (cells from the first), colours of object and upper door, limit."""

    task: Corridor

    def __init__(self, task: Corridor, environments: int, generator: torch.Generator, train: bool):
        super().__init__(task, environments, generator, train)
        # All that can be seen: each end counts up to two cells away, for each colour of the object and the upper door.
        near = [(left, right) for left in range(3) for right in range(3)]
        colours = [(thing, upper) for thing in (RED, BLUE) for upper in (RED, BLUE)]
        seen = [
            view(draw(left + right + 1, thing, upper), 1, left + 1, self.task.words)
            for left, right in near
            for thing, upper in colours
        ]
        self.views = torch.stack(seen).to(self.device)  # (36, 54)
        self.shift = torch.tensor([0, 1, 0, -1], device=self.device)  # cells, by action: up, right, down, left

    def begin(self) -> dict[str, Tensor]:
        length = self.draw(self.task.shortest, self.stage)
        colours = self.draw(0, 3 if self.task.random_sides else 1)
        fixed = self.task.time_limit
        limit = 4 * length + 16 if fixed is None else torch.full_like(length, fixed)
        return {"length": length, "place": self.zeros, "object": colours & 1, "upper": colours >> 1, "limit": limit}

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        episode, shift = self.episode, self.shift.index_select(0, action)
        end = episode.length - 1
        door = (episode.place == end) & (shift == 0)
        colour = episode.upper ^ (action >> 1)  # of the door that is up (0) or down (2)
        success = door & (colour == episode.object)
        episode.place = torch.minimum((episode.place + shift).clamp(min=0), end)
        return success.float(), door, {"success": success, "distance": episode.length}

    def seen(self) -> list[tuple[Tensor, Tensor]]:
        episode = self.episode
        left, right = episode.place.clamp(max=2), (episode.length - 1 - episode.place).clamp(max=2)
        return [(self.views, 12 * left + 4 * right + 2 * episode.object + episode.upper)]

    def drawing(self, world: int) -> tuple[list[str], int, int, str]:
        episode = self.episode
        drawn = (episode.length, episode.place, episode.object, episode.upper)
        length, place, thing, upper = (int(each[world]) for each in drawn)
        return draw(length, thing, upper), 1, place + 1, f"corridor of {length} cells"


def draw(length: int, thing: int, upper: int) -> list[str]:
    """A corridor's rows, walls included, given the colours of the object and of the upper door."""
    above, below = list("#" * (length + 2)), list("#" * (length + 2))
    above[length], below[length] = "RB" if upper == RED else "BR"
    above[1] = "rb"[thing]  # over the door in a corridor of one cell, of which there is none
    return ["".join(above), "#" + " " * length + "#", "".join(below)]
