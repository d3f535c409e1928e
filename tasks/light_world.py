"""Where the instruction task happens: rooms with exits, and the names of those who walk about in them.

                 tower                         a map of LIGHT's (a .json file), or the village and castle below,
                   |                           which are our own
    chapel -- great hall -- kitchen
                   |
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOMS = {  # and where one can go from each
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
    exits: list[list[int]]  # of each room, the rooms one can go to
    agents: list[str]  # names, all different


def build_map(path: str | Path | None, rooms: int | None = None, agents: int | None = None) -> Map:
    """The rooms of a file, or of ours, that can be reached from the first, nearest first, and who is there.

    rooms, agents       the first so many (None: all); of agents with one name the first counts

    Raises FileNotFoundError without such a file, ValueError where it is not a map, or one that is too small.
    """
    name = "the built-in world" if path is None else f"task.world={path}"
    if path is None:
        names, exits, found = {room: room for room in ROOMS}, dict(ROOMS), list(AGENTS)
    else:
        names, exits, found = read(path, name)
    order = list(names)[:1]
    for room in order:  # grows meanwhile
        order += dict.fromkeys(exit for exit in exits[room] if exit not in order)
    order = order[:rooms]
    place = {room: number for number, room in enumerate(order)}
    made = Map(
        [names[room] for room in order],
        [[place[exit] for exit in exits[room] if exit in place] for room in order],
        list(dict.fromkeys(found))[:agents],
    )
    for room, there in zip(made.rooms, made.exits, strict=True):
        if not there:
            raise ValueError(f"{name}: room {room!r} has no exits")
    for what, least, have, limit in (("rooms", 2, order, rooms), ("agents", 3, made.agents, agents)):
        if len(have) < least:
            raise ValueError(f"{name} has {len(have)} {what} with task.{what}={limit}, at least {least} are needed")
    return made


def read(path: str | Path, name: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]], list[str]]:
    """The rooms' names and exits by their keys, and the agents' names, of a map of LIGHT's."""
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{name} does not exist (looked at {place.absolute()})")
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        nodes, rooms = content["nodes"], content["rooms"]
        names = {room: nodes[room]["name"].lower() for room in rooms}
        exits = {room: tuple(nodes[room]["neighbors"]) for room in rooms}
        agents = [nodes[agent]["name"].lower() for agent in content["agents"]]
    except KeyError as error:
        raise ValueError(f"{name} has no key {error}; a map has rooms, agents and nodes with names, exits") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is not a map of LIGHT's ({error})") from None
    if not rooms:
        raise ValueError(f"{name} has no rooms")
    for room, there in exits.items():
        for exit in there:
            if exit not in names:
                raise ValueError(f"{name}: an exit of {room!r} leads to {exit!r}, which is not one of its rooms")
    return names, exits, agents
