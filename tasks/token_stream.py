"""One long text as B parallel streams: each starts in its own part of the text and reads it block by block.

    part 1: a b c d e    ->  block 1: a b c   targets: b c d     block 2: d e   targets: e f
    part 2: f g h i j ...             f g h            g h i              i j            j k

Every token but the very first is scored, once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .base import IGNORE_INDEX, Batch, Task

# The length of a last block is rounded up to a multiple of this, as Compressive pools 2, 4 or 8 timesteps into one.
LAST_BLOCK_MULTIPLE = 8


def text_codec(task: Task) -> tuple[Callable[[str], list[int]], Callable[[int], bytes]]:
    """Return how a task converts between text and tokens.

    A `task.vocab` of type str is a vocabulary of characters, a list one of words; None stands for bytes. A character
    that is not in the vocabulary becomes its last token, an unknown word becomes "<unk>" or "<unknown>".

    Returns:
        encode: text to tokens.
        decode: a token to UTF-8.

    Raises:
        ValueError: if the task does not predict the tokens that it reads.
    """
    vocab = task.vocab
    has_no_unknown = isinstance(vocab, str) and len(vocab) == task.vocab_size  # such as the symbols of copy
    if task.num_classes != task.vocab_size or (vocab is None and task.vocab_size != 256) or has_no_unknown:
        raise ValueError(f"task {type(task).__name__} does not predict text, so no text can be generated from it")
    if vocab is None:
        return lambda text: list(text.encode()), lambda token: bytes([token])
    token_of = {symbol: token for token, symbol in enumerate(vocab)}
    if isinstance(vocab, str):
        return (
            lambda text: [token_of.get(character, len(vocab)) for character in text],
            lambda token: (vocab[token] if token < len(vocab) else "\N{REPLACEMENT CHARACTER}").encode(),
        )
    unknown = token_of.get("<unk>", token_of.get("<unknown>", 0))
    end_of_line = "<eos>" if "<eos>" in token_of else "\n"

    def encode(text: str) -> list[int]:
        lines = [line.split() for line in text.split("\n")]
        words = [word for line in lines[:-1] for word in [*line, end_of_line]] + lines[-1]
        return [token_of.get(word, unknown) for word in words]

    return encode, lambda token: b"\n" if vocab[token] == end_of_line else f"{vocab[token]} ".encode()


class TokenStream:
    """Next-token batches of one long array. A part's last target is the first token of the next part.

    Args:
        tokens: The text as integers, (N,); may be a memory map.
        batch_size: Number of parts, B.
        block_size: Timesteps of a block, T.
        endless: Whether every stream reads on into the next part, and from the end of the text back to its start, as in
            training. Otherwise every stream ends with its part; the last block is shorter, and padded with
            IGNORE_INDEX targets.
        name: What error messages call the text.

    Raises:
        ValueError: if the text is too short: an endless one for one block per stream, another one for one target.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, block_size: int, endless: bool, name: str):
        needed = batch_size * block_size + 1 if endless else 2
        if len(tokens) < needed:
            streams = f" for {batch_size} streams of a block of {block_size}" if endless else ""
            raise ValueError(f"{name} has {len(tokens):,} tokens, at least {needed:,} are needed{streams}")
        self.tokens, self.block_size, self.endless = tokens, block_size, endless
        self.bounds = np.arange(batch_size + 1) * (len(tokens) - 1) // batch_size  # (B + 1,): where parts start and end
        self.time = 0  # tokens read by each stream

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        index = self.bounds[:-1, None] + np.arange(self.time, self.time + self.block_size)  # (B, T)
        inside = index < self.bounds[1:, None]
        if not self.endless:
            if not inside.any():
                raise StopIteration
            # Cut off whole columns of padding: they would count as memories.
            length = -(-inside.any(0).sum() // LAST_BLOCK_MULTIPLE) * LAST_BLOCK_MULTIPLE
            index, inside = index[:, :length], inside[:, :length]
        self.time += self.block_size
        index %= len(self.tokens) - 1  # the last token is only a target
        tokens, targets = self.tokens[index].astype(np.int64), self.tokens[index + 1].astype(np.int64)
        if not self.endless:
            targets[~inside] = IGNORE_INDEX
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))

    def state_dict(self) -> dict[str, Any]:
        return {"time": self.time}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.time = state["time"]
