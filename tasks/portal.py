"""Portal (section 5.2, figure 5): find out, and remember, which of two doors leads on, in one room after another.

Each room has a red and a blue door. One leads on to the next room, the other back to the first; which one is drawn for
each room of each episode, and cannot be seen. Going on from the k-th room gives reward 0.1 k, every time. The episode
ends in the last room, after two mistakes in the same room, or after 1000 timesteps.

    # # # # # # #
    #           #
    #           #
    # B   @   R #      a room of 5 x 5 cells; the agent sees the 3 x 3 cells around it and the number of the room
    #           #
    #           #
    # # # # # # #

Where the doors and the start are, how many colors there are, and that the reward is given every time are our choice.
"""

import torch
from torch import Tensor

from .gridworld import Draws, Gridworld, GridworldEnvs, agent_view

LEFT_SIDE, RIGHT_SIDE = range(2)
# A room is one int8: the side of the door that leads on, plus 2 x the side of the red door, plus MISTAKE x mistakes.
MISTAKE = 4
MOST_MISTAKES = 127 // MISTAKE - 1


class Portal(Gridworld):
    """Words of a cell: agent, block, door, red, blue; then the number of the room, one word each; then the last action.

    Keys of `episode_info`: success (the last room was reached), episode_return, episode_length, truncated, rooms (the
    number of the furthest room visited), room_fraction (fraction of the episode's rooms visited).

    Args:
        num_rooms: Number of rooms in a row.
        room_size: Cells per side, odd; the doors are in the middle of the left and right column, the start is the
            center.
        max_mistakes: Number of mistakes in the same room with which the episode ends.
        max_episode_steps: Highest number of timesteps of an episode.
        initial_num_rooms: Number of rooms of the first training episodes (None: `num_rooms` at once).
        curriculum_threshold: Mean fraction of the rooms visited from which a room is added.
        curriculum_min_intervals: Minimum number of calls of `update_curriculum` before a room is added.
        observe_last_action: Whether the agent observes its last action.
        seed: Seed of the random numbers.

    Raises:
        ValueError: if the arguments do not fit each other.
    """

    cell_words = ("agent", "block", "door", "red", "blue")
    metric, progress_metric = "rooms", "room_fraction"

    def __init__(
        self,
        num_rooms: int = 50,
        room_size: int = 5,
        max_mistakes: int = 2,
        max_episode_steps: int = 1000,
        initial_num_rooms: int | None = None,
        curriculum_threshold: float = 0.88,
        curriculum_min_intervals: int = 1,
        observe_last_action: bool = True,
        seed: int = 0,
    ):
        initial_num_rooms = num_rooms if initial_num_rooms is None else initial_num_rooms
        if num_rooms < 2:
            raise ValueError(f"task.num_rooms must be at least 2, got {num_rooms}")
        if room_size < 3 or room_size % 2 == 0:
            raise ValueError(f"task.room_size must be odd and at least 3 cells, got {room_size}")
        if not 1 <= max_mistakes <= MOST_MISTAKES:
            raise ValueError(f"task.max_mistakes must be 1 to {MOST_MISTAKES}, got {max_mistakes}")
        reachable = max_episode_steps // (room_size // 2) + 1
        if num_rooms > reachable:
            limits = f"at most {reachable} for task.max_episode_steps={max_episode_steps}"
            raise ValueError(f"task.num_rooms must be {limits}, got {num_rooms}")
        if not 2 <= initial_num_rooms <= num_rooms:
            limits = f"2 to task.num_rooms={num_rooms}"
            raise ValueError(f"task.initial_num_rooms must be {limits}, got {initial_num_rooms}")
        super().__init__(
            initial_stage=initial_num_rooms,
            final_stage=num_rooms,
            eval_stage=num_rooms,
            curriculum_threshold=curriculum_threshold,
            curriculum_min_intervals=curriculum_min_intervals,
            observe_last_action=observe_last_action,
            seed=seed,
            num_extra_words=num_rooms,
        )
        self.num_rooms, self.room_size, self.max_mistakes = num_rooms, room_size, max_mistakes
        self.max_episode_steps, self.initial_num_rooms = max_episode_steps, initial_num_rooms
        self.center = room_size * room_size // 2  # cells are numbered row by row

    def create_envs(self, draws: Draws, train: bool) -> GridworldEnvs:
        return PortalEnvs(self, draws, train)

    def next_stage(self) -> int:
        return self.curriculum_stage + 1


class PortalEnvs(GridworldEnvs):
    """Rows of rooms. An episode consists of these, (B,) each, but for rooms.

    cell: the agent's, within the room. room, furthest_room, last_room: from 0. rooms: (B, num_rooms) int8, see MISTAKE.
    max_episode_steps.
    """

    task: Portal

    def __init__(self, task: Portal, draws: Draws, train: bool):
        super().__init__(task, draws, train)
        size = self.task.room_size
        middle = size // 2
        next_cell, door_side = [], []
        for row in range(size):
            for column in range(size):
                for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
                    to_row, to_column = min(max(row + down, 0), size - 1), min(max(column + right, 0), size - 1)
                    next_cell.append(to_row * size + to_column)
                    doors = {(middle, 0): LEFT_SIDE, (middle, size - 1): RIGHT_SIDE}
                    door_side.append(doors.get((to_row, to_column), -1))
        # By 4 * cell + action: the cell that it leads to, and the side of the door there (-1: none).
        self.next_cell = torch.tensor(next_cell, device=self.device)  # (cells * 4,)
        self.door_side = torch.tensor(door_side, device=self.device)  # (cells * 4,)
        views = [
            agent_view(draw_room(size, red_side), row + 1, column + 1, self.task.cell_words)
            for row in range(size)
            for column in range(size)
            for red_side in (LEFT_SIDE, RIGHT_SIDE)
        ]
        self.views = torch.stack(views).to(self.device)  # (cells * 2, 45)
        self.room_numbers = torch.eye(self.task.num_rooms, device=self.device)

    def sample_episodes(self) -> dict[str, Tensor]:
        return {
            "cell": torch.full_like(self.zeros, self.task.center),
            "room": self.zeros,
            "furthest_room": self.zeros,
            "last_room": torch.full_like(self.zeros, self.stage - 1),
            "max_episode_steps": torch.full_like(self.zeros, self.task.max_episode_steps),
            "rooms": self.draws.integers(0, MISTAKE - 1, self.task.num_rooms, dtype=torch.int8),
        }

    def current_room(self) -> Tensor:
        """The entry of `rooms` for the room that each agent is in: (B,) int8."""
        return self.episode.rooms.gather(1, self.episode.room[:, None])[:, 0]

    def transition(self, action: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        episode, current_room = self.episode, self.current_room()
        move = 4 * episode.cell + action
        side = self.door_side.index_select(0, move)
        right_door, wrong_door = side == (current_room & 1), side == (current_room & 1 ^ 1)
        current_room = current_room + MISTAKE * wrong_door.to(torch.int8)
        episode.rooms = episode.rooms.scatter(1, episode.room[:, None], current_room[:, None])
        too_many_mistakes = wrong_door & (current_room >= MISTAKE * self.task.max_mistakes)
        reward = 0.1 * (right_door * (episode.room + 1))
        episode.room = (episode.room + right_door) * ~wrong_door
        episode.furthest_room = torch.maximum(episode.furthest_room, episode.room)
        episode.cell = self.next_cell.index_select(0, move).masked_fill(right_door | wrong_door, self.task.center)
        success, rooms = episode.room == episode.last_room, episode.furthest_room + 1
        info = {"success": success, "rooms": rooms, "room_fraction": rooms / (episode.last_room + 1)}
        return reward, success | too_many_mistakes, info

    def observation_parts(self) -> list[tuple[Tensor, Tensor]]:
        red_side = self.current_room() >> 1 & 1
        return [(self.views, 2 * self.episode.cell + red_side), (self.room_numbers, self.episode.room)]

    def ascii_map(self, env: int) -> tuple[list[str], int, int, str]:
        episode = self.episode
        room, last_room, cell = (int(value[env]) for value in (episode.room, episode.last_room, episode.cell))
        current_room = int(self.current_room()[env])
        leads_on, red_side, mistakes = current_room & 1, current_room >> 1 & 1, current_room // MISTAKE
        row, column = divmod(cell, self.task.room_size)
        secret = f"{'red' if leads_on == red_side else 'blue'} leads on, {mistakes} mistakes"
        caption = f"room {room + 1} of {last_room + 1} ({secret})"
        return draw_room(self.task.room_size, red_side), row + 1, column + 1, caption


def draw_room(size: int, red_side: int) -> list[str]:
    """The rows of a room, walls included."""
    rows = ["#" * (size + 2), *(["#" + " " * size + "#"] * size), "#" * (size + 2)]
    left, right = "RB" if red_side == LEFT_SIDE else "BR"
    rows[size // 2 + 1] = "#" + left + " " * (size - 2) + right + "#"
    return rows
