"""What agents of the instruction task say: LIGHT's dialogues, a list of your own, or the grammar below.

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

from .base import SPLITS
from .data_cache import cache_dir, cached_file, check_is_file, download, read_json, user_path

URL = "https://parl.ai/downloads/light/light-dialog-processed-small7.pkl"
SIZE, SHA256 = 145_780_274, "7c83cf49818586db9999ea67a4a6ad087afbd91c26ed629a9f00e21d0b84058f"
# LIGHT shuffles these dialogues; the first 1000 are its test split, the next 500 valid, all others train.
SHUFFLED, NUM_TEST, NUM_VALID = range(1368, 4733), 1000, 500

OPENING = ("i heard that", "they say", "my cousin swears", "nobody believes that", "remember when", "i dreamt that")
WHO = ("an old goat", "my uncle", "a stranger", "the youngest sister", "some pedlar", "a lazy crow", "our neighbour")
WHAT = ("hid", "dropped", "painted", "sold", "polished", "swallowed", "mended")
WHICH = ("a silver spoon", "the last lantern", "two wheels of cheese", "his wooden leg", "a crooked ladder", "my boots")
WHERE = ("by the river.", "under the bridge.", "before dawn.", "for a wager.", "in the rain.", "out of pity.")


class DataUnpickler(pickle.Unpickler):
    """Unpickle lists, dicts, strings and numbers. Anything else could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_pickle(file: BinaryIO, name: str) -> Any:
    """The plain data in a pickle.

    Raises:
        ValueError: if it holds anything else, with a message that begins with `name`.
    """
    try:
        return DataUnpickler(file).load()
    except Exception as error:  # a damaged or malicious pickle can cause any
        reason = str(error)[:100].encode("unicode_escape").decode()  # it may quote the content
        raise ValueError(f"{name} is not a pickle of plain data, and is not run ({reason})") from None


def load_dialogue(source: str | Path | None) -> dict[str, list[str]]:
    """The utterances of each split. LIGHT's dialogues are split; otherwise every split has all utterances.

    Args:
        source: Where the utterances come from. "light": LIGHT's dialogues, downloaded on first use (146 MB); a .pkl
            file of LIGHT's dialogues; a .json file with a list of utterances; None: about ten thousand built-in ones.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not hold what its name says.
    """
    if source is None:
        built_in = [" ".join(words) for words in product(OPENING, WHO, WHAT, WHICH, WHERE)]
        return dict.fromkeys(SPLITS, built_in)
    if source == "light":
        archive = cache_dir() / "light-dialog-processed-small7.pkl"
        extracted = cache_dir() / "light-utterances.json"
        cached_file(extracted, lambda: [extract(download(URL, archive, SIZE, SHA256))])
        content = read_json(extracted, str(extracted))
        if not isinstance(content, dict) or not all(is_list_of_strings(content.get(split)) for split in SPLITS):
            raise ValueError(f"{extracted} does not hold the utterances of each split: delete it and run again")
        return content
    path, name = user_path(source), f"task.dialogue={source}"
    if path.suffix == ".pkl":
        check_is_file(path, name)
        return json.loads(extract(path))
    content = read_json(path, name)
    if not is_list_of_strings(content):
        raise ValueError(f"{name} must hold a list of strings, got {str(content)[:60]}")
    return dict.fromkeys(SPLITS, content)


def is_list_of_strings(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(utterance, str) for utterance in content)


def extract(path: Path) -> bytes:
    """The utterances of each split, as JSON, of a pickle of LIGHT's dialogues."""
    with open(path, "rb") as file:
        dialogues = load_pickle(file, str(path))
    if not isinstance(dialogues, list) or not dialogues:
        what = "nothing" if not dialogues else type(dialogues).__name__
        raise ValueError(f"{path} must hold a list of LIGHT's dialogues, it holds {what}")
    shuffled = [number for number in SHUFFLED if number < len(dialogues)]
    random.Random(42).shuffle(shuffled)
    numbers = {"test": shuffled[:NUM_TEST], "valid": shuffled[NUM_TEST : NUM_TEST + NUM_VALID]}
    held_out = {*numbers["test"], *numbers["valid"]}
    numbers["train"] = [number for number in range(len(dialogues)) if number not in held_out]
    try:
        split_utterances = {split: list(utterances(dialogues, numbers[split])) for split in SPLITS}
        if not all(map(is_list_of_strings, split_utterances.values())):
            raise ValueError(f"{path} does not hold LIGHT's dialogues (an utterance is not a string)")
        return json.dumps(split_utterances).encode()
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path} does not hold LIGHT's dialogues (no {error})") from None


def utterances(dialogues: list[dict[str, Any]], numbers: list[int]) -> Iterator[str]:
    """What is said in the dialogues of these numbers; a turn without words is None."""
    for number in numbers:
        yield from filter(None, dialogues[number]["speech"])
