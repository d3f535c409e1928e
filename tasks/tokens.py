"""One long text as B streams side by side: each starts in its own part of it, and block follows block.

    part 1: a b c d e    ->  block 1: a b c   targets: b c d     block 2: d e   targets: e f
    part 2: f g h i j ...             f g h            g h i              i j            j k

Scored is every token but the very first, once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .stream import IGNORED, Batch

UNIT = 8  # timesteps, of which a last block has some: as Compressive pools by four, or two, or eight


def written(task: Any) -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """How a task turns text into tokens, and a token into text, in UTF-8: by bytes, characters or words.

    A task with `alphabet`, a string of characters or a list of words, has what its tokens stand for in it; `words` is
    as good. What it lacks is its last token, or "<unknown>"; one without either is of bytes.
    Raises ValueError where the task does not predict its own tokens.
    """
    known = getattr(task, "alphabet", None) or getattr(task, "words", None)
    if task.classes != task.vocabulary or (known is None and task.vocabulary != 256):
        raise ValueError(f"task {type(task).__name__} is not one of text, which alone can be written on")
    if known is None:
        return lambda text: list(text.encode()), lambda token: bytes([token])
    number = {each: token for token, each in enumerate(known)}
    if isinstance(known, str):
        return (
            lambda text: [number.get(character, len(known)) for character in text],
            lambda token: (known[token] if token < len(known) else "\N{REPLACEMENT CHARACTER}").encode(),
        )
    unknown = number.get("<unk>", number.get("<unknown>", 0))
    end = "<eos>" if "<eos>" in number else "\n"

    def encode(text: str) -> list[int]:
        lines = [line.split() for line in text.split("\n")]
        words = [word for line in lines[:-1] for word in [*line, end]] + lines[-1]
        return [number.get(word, unknown) for word in words]

    return encode, lambda token: (b"\n" if known[token] == end else f"{known[token]} ".encode())


class TokenStream:
    """Next-token batches of `array`, (N,) of whole numbers, which may be a memory map.

    A part's last target is the next part's first token, so that each but the very first is a target once a round.
    `endless`: each stream reads on into the next part, and after the last token from the first on. Else each ends with
    its part: the last block is shorter, some UNITs, and filled up with IGNORED.

    Raises ValueError, beginning with `name`, where the array is too short: endless, for a block a stream; else, for
    a target.
    """

    def __init__(self, array: np.ndarray, batch: int, block: int, endless: bool, name: str):
        needed = batch * block + 1 if endless else 2
        if len(array) < needed:
            streams = f" for {batch} streams of a block of {block}" if endless else ""
            raise ValueError(f"{name} has {len(array):,} tokens, at least {needed:,} are needed{streams}")
        self.array, self.block, self.endless = array, block, endless
        self.starts = np.arange(batch + 1) * (len(array) - 1) // batch  # (B + 1,): of the parts, and the end
        self.time = 0  # tokens read by each stream

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        index = self.starts[:-1, None] + np.arange(self.time, self.time + self.block)  # (B, T)
        inside = index < self.starts[1:, None]
        if not self.endless:
            if not inside.any():
                raise StopIteration
            left = -(-inside.any(0).sum() // UNIT) * UNIT  # or what is not there would count as remembered
            index, inside = index[:, :left], inside[:, :left]
        self.time += self.block
        index %= len(self.array) - 1  # the last token is only a target
        tokens, targets = self.array[index].astype(np.int64), self.array[index + 1].astype(np.int64)
        if not self.endless:
            targets[~inside] = IGNORED
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time = state["time"]
