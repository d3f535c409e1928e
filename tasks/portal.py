"""Portal (figure 5, section 5.2): find out, and remember, which of two doors leads on, in one room after another.

Each room has a red and a blue door. One leads on to the next room, the other back to the first; which one is drawn
for each room and episode, and cannot be seen. For going from the k-th room to the next the agent gains 0.1 k, each
time. The episode ends in the last room, after two mistakes in the same room, or after 1000 timesteps.

    # # # # # # #
    #           #
    #           #
    # B   @   R #      a room of 5 x 5 cells; of where the agent is it sees 3 x 3 cells, and the room's number
    #           #
    #           #
    # # # # # # #

Where doors and start are, how many colours there are, and that the reward is given each time are our choice.
"""

import torch
from torch import Tensor

from .gridworld import Gridworld, Worlds, view

ON_LEFT, ON_RIGHT = range(2)
MISTAKE = 4  # a room is one int8: the side that leads on, plus 2 x the side of the red door, plus MISTAKE x mistakes
MOST_MISTAKES = 127 // MISTAKE - 1


class Portal(Gridworld):
    """Words of a cell: agent, block, door, red, blue; then the room's number, one word each; then the last action.

    rooms               number of rooms in a row
    size                cells a side, odd; doors are in the middle of the left and right column, the start is the centre
    mistakes            the episode ends with so many in the same room
    time_limit          timesteps
    first_rooms         rooms of the first training episodes, one more each time (None: `rooms` at once)
    bar, wait           one room more when the mean share of rooms reaches bar, `wait` feedbacks apart
    last_action         whether the agent is told its last action

    Figures in `Worlds.ended`: success (the last room was reached), return, length, late, rooms (visited: the furthest
    room's number), share (of the episode's rooms).
    Raises ValueError where these do not fit each other.
    """

    words = ("agent", "block", "door", "red", "blue")
    measure, progress = "rooms", "share"

    def __init__(
        self,
        rooms: int = 50,
        size: int = 5,
        mistakes: int = 2,
        time_limit: int = 1000,
        first_rooms: int | None = None,
        bar: float = 0.88,
        wait: int = 1,
        last_action: bool = True,
        seed: int = 0,
    ):
        first_rooms = rooms if first_rooms is None else first_rooms
        if rooms < 2:
            raise ValueError(f"task.rooms must be at least 2, got {rooms}")
        if size < 3 or size % 2 == 0:
            raise ValueError(f"task.size must be odd and at least 3 cells, got {size}")
        if not 1 <= mistakes <= MOST_MISTAKES:
            raise ValueError(f"task.mistakes must be 1 to {MOST_MISTAKES}, got {mistakes}")
        reachable = time_limit // (size // 2) + 1
        if rooms > reachable:
            raise ValueError(f"task.rooms must be at most {reachable} for task.time_limit={time_limit}, got {rooms}")
        if not 2 <= first_rooms <= rooms:
            raise ValueError(f"task.first_rooms must be 2 to task.rooms={rooms}, got {first_rooms}")
        super().__init__(first_rooms, rooms, rooms, bar, wait, last_action, seed)
        self.rooms, self.size, self.mistakes, self.time_limit = rooms, size, mistakes, time_limit
        self.extra, self.start = rooms, size * size // 2  # the middle cell, row by row

    def make(self, environments: int, generator: torch.Generator, train: bool) -> Worlds:
        return PortalWorlds(self, environments, generator, train)

    def harder(self) -> int:
        return self.stage + 1


class PortalWorlds(Worlds):
    """Of an episode, (B,) each: cell, room, furthest and last room (from 0), limit; and the rooms (B, rooms)."""

    task: Portal

    def __init__(self, task: Portal, environments: int, generator: torch.Generator, train: bool):
        super().__init__(task, environments, generator, train)
        size = self.task.size
        middle = size // 2
        goes, through = [], []
        for row in range(size):
            for column in range(size):
                for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
                    to = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
                    goes.append(to[0] * size + to[1])
                    through.append({(middle, 0): ON_LEFT, (middle, size - 1): ON_RIGHT}.get(to, -1))
        self.goes = torch.tensor(goes, device=self.device)  # (cells * 4,): the next cell, by 4 * cell + action
        self.through = torch.tensor(through, device=self.device)  # likewise: the side of the door there, -1 for none
        seen = [
            view(draw(size, red), row + 1, column + 1, self.task.words)
            for row in range(size)
            for column in range(size)
            for red in (ON_LEFT, ON_RIGHT)
        ]
        self.views = torch.stack(seen).to(self.device)  # (cells * 2, 45)
        self.numbers = torch.eye(self.task.rooms, device=self.device)

    def begin(self) -> dict[str, Tensor]:
        return {
            "cell": torch.full_like(self.zeros, self.task.start),
            "room": self.zeros,
            "furthest": self.zeros,
            "last": torch.full_like(self.zeros, self.stage - 1),
            "limit": torch.full_like(self.zeros, self.task.time_limit),
            "rooms": self.draw(0, MISTAKE - 1, self.task.rooms, dtype=torch.int8),
        }

    def here(self) -> Tensor:
        """What the room is that the agent is in: (B,) int8."""
        return self.episode.rooms.gather(1, self.episode.room[:, None])[:, 0]

    def move(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        episode, here = self.episode, self.here()
        there = 4 * episode.cell + action
        side = self.through.index_select(0, there)
        right, wrong = side == (here & 1), side == (here & 1 ^ 1)
        after = here + MISTAKE * wrong.to(torch.int8)
        episode.rooms = episode.rooms.scatter(1, episode.room[:, None], after[:, None])
        too_many = wrong & (after >= MISTAKE * self.task.mistakes)
        reward = 0.1 * (right * (episode.room + 1))
        episode.room = (episode.room + right) * ~wrong
        episode.furthest = torch.maximum(episode.furthest, episode.room)
        episode.cell = self.goes.index_select(0, there).masked_fill(right | wrong, self.task.start)
        success, rooms = episode.room == episode.last, episode.furthest + 1
        figures = {"success": success, "rooms": rooms, "share": rooms / (episode.last + 1)}
        return reward, success | too_many, figures

    def seen(self) -> list[tuple[Tensor, Tensor]]:
        episode = self.episode
        red = self.here() >> 1 & 1
        return [(self.views, 2 * episode.cell + red), (self.numbers, episode.room)]

    def drawing(self, world: int) -> tuple[list[str], int, int, str]:
        episode = self.episode
        room, last, cell, here = (int(each[world]) for each in (episode.room, episode.last, episode.cell, self.here()))
        leads_on, red, mistakes = here & 1, here >> 1 & 1, here // MISTAKE
        row, column = divmod(cell, self.task.size)
        told = f"{'red' if leads_on == red else 'blue'} leads on, {mistakes} mistakes"
        return draw(self.task.size, red), row + 1, column + 1, f"room {room + 1} of {last + 1} ({told})"


def draw(size: int, red: int) -> list[str]:
    """A room's rows, walls included, given the side of the red door."""
    rows = ["#" * (size + 2), *(["#" + " " * size + "#"] * size), "#" * (size + 2)]
    left, right = "RB" if red == ON_LEFT else "BR"
    rows[size // 2 + 1] = "#" + left + " " * (size - 2) + right + "#"
    return rows
