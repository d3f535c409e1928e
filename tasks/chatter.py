"""What people say to each other while nothing happens: LIGHT's dialogues, a list of your own, or the grammar below.

    they say   a lazy crow   swallowed   the last lantern   under the bridge.
    OPENING    WHO           WHAT        WHICH              WHERE
"""

import json
import pickle
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from .download import cache_folder, download, keep
from .stream import SPLITS

URL = "https://parl.ai/downloads/light/light-dialog-processed-small7.pkl"
SIZE, SHA256 = 145_780_274, "7c83cf49818586db9999ea67a4a6ad087afbd91c26ed629a9f00e21d0b84058f"
SHUFFLED, TEST, VALID = range(1368, 4733), 1000, 500  # dialogues: those that the tests come from, and how many do

OPENING = ("i heard that", "they say", "my cousin swears", "nobody believes that", "remember when", "i dreamt that")
WHO = ("an old goat", "my uncle", "a stranger", "the youngest sister", "some pedlar", "a lazy crow", "our neighbour")
WHAT = ("hid", "dropped", "painted", "sold", "polished", "swallowed", "mended")
WHICH = ("a silver spoon", "the last lantern", "two wheels of cheese", "his wooden leg", "a crooked ladder", "my boots")
WHERE = ("by the river.", "under the bridge.", "before dawn.", "for a wager.", "in the rain.", "out of pity.")


class DataUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. Anything else in a pickle could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(file: BinaryIO, name: str) -> Any:
    """The plain data in a pickle. Raises ValueError, beginning with `name`, where it holds anything but data."""
    try:
        return DataUnpickler(file).load()
    except Exception as error:  # whatever a damaged or malicious one provokes
        raise ValueError(f"{name} is not a pickle of plain data, and is not run ({error})") from None


def build_chatter(source: str | Path | None) -> dict[str, list[str]]:
    """Utterances by split: LIGHT's dialogues have their own, elsewhere all splits have all.

    source      "light": LIGHT's dialogues, fetched on first use (146 MB); a .pkl file of LIGHT's dialogues; a .json
                file with a list of utterances; None: about ten thousand of ours

    Raises FileNotFoundError without such a file, ValueError where it is not what its name says.
    """
    if source is None:
        built_in = [" ".join(parts) for parts in product(OPENING, WHO, WHAT, WHICH, WHERE)]
        return dict.fromkeys(SPLITS, built_in)
    if source == "light":
        archive = cache_folder() / "light-dialog-processed-small7.pkl"
        made = keep(cache_folder() / "light-utterances.json", lambda: [extract(download(URL, archive, SIZE, SHA256))])
        return json.loads(made.read_bytes())
    place, name = Path(source).expanduser(), f"task.chatter={source}"
    if not place.exists():
        raise FileNotFoundError(f"{name} does not exist (looked at {place.absolute()})")
    if place.suffix == ".pkl":
        return json.loads(extract(place))
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from None
    if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
        raise ValueError(f"{name} must hold a list of strings, got {str(content)[:60]}")
    return dict.fromkeys(SPLITS, content)


def extract(path: Path) -> bytes:
    """The utterances by split, as JSON, of a pickle of LIGHT's dialogues."""
    with open(path, "rb") as file:
        dialogues = load_pickle(file, str(path))
    shuffled = [number for number in SHUFFLED if number < len(dialogues)]
    random.Random(42).shuffle(shuffled)
    parts = {"test": shuffled[:TEST], "valid": shuffled[TEST : TEST + VALID]}
    held_out = {number for part in parts.values() for number in part}
    parts["train"] = [number for number in range(len(dialogues)) if number not in held_out]
    try:
        return json.dumps({split: list(speech(dialogues, parts[split])) for split in SPLITS}).encode()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold LIGHT's dialogues (no {error})") from None


def speech(dialogues: list[dict[str, Any]], numbers: list[int]) -> Iterator[str]:
    for number in numbers:
        yield from filter(None, dialogues[number]["speech"])
