"""The map of the instruction task: rooms with exits, and the names of the agents that walk about in them.

             tower                         a map of LIGHT's (a .json file), or the built-in village and castle
               |                           below
chapel -- great hall -- kitchen
               |
"""

from pathlib import Path
from typing import NamedTuple

from .data_cache import read_json, user_path

ROOMS = {  # with the rooms that their exits lead to
    "market square": ("bakery", "smithy", "castle gate", "mill road"),
    "bakery": ("market square", "mill road"),
    "smithy": ("market square", "stable"),
    "castle gate": ("market square", "courtyard"),
    "mill road": ("market square", "bakery", "orchard"),
    "orchard": ("mill road", "chapel"),
    "stable": ("smithy", "courtyard"),
    "courtyard": ("castle gate", "stable", "great hall"),
    "great hall": ("courtyard", "kitchen", "chapel", "tower"),
    "kitchen": ("great hall", "cellar"),
    "chapel": ("great hall", "orchard"),
    "tower": ("great hall",),
    "cellar": ("kitchen",),
}
AGENTS = ("miller", "queen", "blacksmith", "monk", "piper", "cook", "night watchman", "beekeeper", "squire", "ferryman")


class Map(NamedTuple):
    """A connected map."""

    rooms: list[str]  # names
    exits: list[list[int]]  # for each room, the rooms that its exits lead to
    agents: list[str]  # names, all different


def load_map(path: str | Path | None, num_rooms: int | None = None, num_agents: int | None = None) -> Map:
    """The rooms that can be reached from the first one, nearest first, and the agents in them.

    Args:
        path: File of a map of LIGHT's (None: the built-in one).
        num_rooms: Number of rooms to keep, the first ones (None: all).
        num_agents: Number of agents to keep, the first ones (None: all). Of several agents with one name, the
            first counts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a map, or too small.
    """
    for key, number in (("num_rooms", num_rooms), ("num_agents", num_agents)):
        if number is not None and number < 1:
            raise ValueError(f"task.{key} must be at least 1, got {number}; for all use null")
    name = "the built-in map" if path is None else f"task.map_path={path}"
    if path is None:
        names, exits, agents = {room: room for room in ROOMS}, dict(ROOMS), list(AGENTS)
    else:
        names, exits, agents = read_map(path, name)
    keys = list(names)[:1]
    for room in keys:  # breadth-first: the list grows during the loop
        keys += dict.fromkeys(exit for exit in exits[room] if exit not in keys)
    keys = keys[:num_rooms]
    number_of = {room: number for number, room in enumerate(keys)}
    result = Map(
        [names[room] for room in keys],
        [[number_of[exit] for exit in exits[room] if exit in number_of] for room in keys],
        list(dict.fromkeys(agents))[:num_agents],
    )
    for room, room_exits in zip(result.rooms, result.exits, strict=True):
        if not room_exits:
            raise ValueError(f"{name}: room {room!r} has no exits")
    if len(result.rooms) < 2:
        have = f"{len(result.rooms)} rooms with task.num_rooms={num_rooms}"
        raise ValueError(f"{name} has {have}, at least 2 are needed")
    if len(result.agents) < 3:
        have = f"{len(result.agents)} agents with task.num_agents={num_agents}"
        raise ValueError(f"{name} has {have}, at least 3 are needed")
    return result


def read_map(path: str | Path, name: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[str]]:
    """Of a map of LIGHT's, the names and the exits of the rooms, by their keys, and the names of the agents."""
    content = read_json(user_path(path), name)
    try:
        nodes, rooms = content["nodes"], content["rooms"]
        names = {room: nodes[room]["name"].lower() for room in rooms}
        exits = {room: tuple(nodes[room]["neighbors"]) for room in rooms}
        agents = [nodes[agent]["name"].lower() for agent in content["agents"]]
    except KeyError as error:
        raise ValueError(f"{name} has no key {error}; a map has rooms, agents and nodes with names, exits") from None
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name} is not a map of LIGHT's ({error})") from None
    if not rooms:
        raise ValueError(f"{name} has no rooms")
    for room, room_exits in exits.items():
        for exit in room_exits:
            if not isinstance(exit, str) or exit not in names:
                raise ValueError(f"{name}: an exit of {room!r} leads to {exit!r}, which is not one of its rooms")
    return names, exits, agents
