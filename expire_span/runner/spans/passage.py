"""What a model reads for `expire-span-spans`: a text, or the beginning of a task's test split."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from expire_span.tasks.base import IGNORE_INDEX, Batch, Task
from expire_span.tasks.token_stream import text_codec

from ..load_run import LoadedRun


class Passage(NamedTuple):
    """Tokens that a model reads as one stream from its start, and what it is asked."""

    tokens: list[int]
    targets: list[int]  # IGNORE_INDEX where nothing is scored
    reach: list[int] | None = None  # timesteps since the episode began; None: one endless episode

    def first(self, count: int) -> "Passage":
        return Passage(self.tokens[:count], self.targets[:count], self.reach and self.reach[:count])

    def blocks(self, run: LoadedRun) -> list[Batch]:
        """Blocks of one stream, on the run's device, of a length that its model can process."""
        block_size = min(run.config.eval.block_size, *(mechanism.max_block_size for mechanism in run.model.mechanisms))

        def split(values: list[int]) -> Sequence[Tensor]:
            return torch.tensor([values], device=run.device).split(block_size, 1)

        tokens = split(self.tokens)
        reach = [None] * len(tokens) if self.reach is None else split(self.reach)
        return [Batch(*fields) for fields in zip(tokens, split(self.targets), reach, strict=True)]


Slot = tuple[int, int, int, int, bool]  # tokens before, from and to; tokens after, from and to; whether replaced


class Codec(NamedTuple):
    """How a task's tokens are written."""

    unit: str  # what a token is: byte, character, word or symbol
    encode: Callable[[str], list[int]]  # raises ValueError for what the tokens cannot say
    decode: Callable[[int], bytes]

    def texts(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; of the bytes of one character the last has it, and the others are empty."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(tokens) - 1
        return [decoder.decode(self.decode(token), final=place == last) for place, token in enumerate(tokens)]


def codec_of(task: Task) -> Codec:
    """How the tokens of a task are written. Raises ValueError if they are neither characters nor words."""
    vocab = task.vocab
    if vocab is None and (task.vocab_size != 256 or task.num_classes != 256):
        raise ValueError(
            f"the timesteps of task {type(task).__name__} are neither characters nor words, so there is no text to "
            "show; that needs text, enwik8, pg19, wikitext103, copy, instruction, or a task of your own with a vocab"
        )
    if vocab is None:
        return Codec("byte", *text_codec(task))
    known = set(vocab)
    if isinstance(vocab, str):
        token_of = {character: token for token, character in enumerate(vocab)}
        symbols = [*vocab, *["\N{REPLACEMENT CHARACTER}"] * (task.vocab_size - len(vocab))]

        def encode_characters(text: str) -> list[int]:
            refuse_unknown(set(text) - known)
            return [token_of[character] for character in text]

        unit = "character" if len(vocab) < task.vocab_size else "symbol"
        return Codec(unit, encode_characters, lambda token: symbols[token].encode())
    encode, decode = text_codec(task)

    def encode_words(text: str) -> list[int]:
        if not known & {"<eos>", "\n"}:  # a line break is no more than a space
            text = text.replace("\n", " ")
        if not known & {"<unk>", "<unknown>"}:
            refuse_unknown(set(text.split()) - known)
        return encode(text)

    return Codec("word", encode_words, decode)


def refuse_unknown(unknown: set[str]) -> None:
    """Raises ValueError that names characters or words, unless there are none."""
    names = [f"{text!r} (U+{ord(text):04X})" if len(text) == 1 else repr(text) for text in sorted(unknown)]
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"not in the vocabulary of this run: {', '.join(names[:10])}{more}; replace or remove them")


def sample_passage(run: LoadedRun, count: int) -> Passage:
    """The first timesteps of the test split. Raises ValueError if they have several fields."""
    tokens: list[int] = []
    targets: list[int] = []
    reach: list[int] | None = []
    for batch in run.task.stream("test", 1, run.config.eval.block_size):
        if batch.tokens.dim() > 2:
            raise ValueError(f"the timesteps of task {type(run.task).__name__} have several fields, not one token")
        tokens += batch.tokens[0].tolist()
        targets += batch.targets[0].tolist()
        reach = None if batch.reach is None or reach is None else reach + batch.reach[0].tolist()
        if len(tokens) >= count:
            break
    if reach is None:  # a text, whose last block is padded
        end = max((place for place, target in enumerate(targets, 1) if target != IGNORE_INDEX), default=0)
        tokens, targets = tokens[:end], targets[:end]
    return Passage(tokens, targets, reach).first(count)


def encode_file(path: Path, codec: Codec) -> list[int]:
    """The tokens of a text file. Raises ValueError if there are none, or if it is not UTF-8 where that is needed."""
    content = path.read_bytes()
    try:
        tokens = list(content) if codec.unit == "byte" else codec.encode(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not tokens:
        raise ValueError(f"{path} is empty: give a text of at least one {codec.unit}")
    return tokens


def text_passage(tokens: list[int], is_scored: bool, has_episodes: bool) -> Passage:
    """A text that is read whole. Its next tokens are the targets where the task is to predict every next token."""
    targets = [*tokens[1:], IGNORE_INDEX] if is_scored else [IGNORE_INDEX] * len(tokens)
    return Passage(tokens, targets, list(range(len(tokens))) if has_episodes else None)


def predicts_every_token(passage: Passage) -> bool:
    return passage.reach is None and passage.targets[:-1] == passage.tokens[1:]


def replace(passage: Passage, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Passage, list[Slot]]:
    """Replace each of several sequences of tokens wherever it occurs, from left to right.

    Returns:
        The changed passage, and what of both stands at the same place, in order: tokens that are kept one by one, and
        what was replaced as a whole. Where the task scores only some targets, the changed passage has none.
    """
    tokens: list[int] = []
    slots: list[Slot] = []
    place = 0
    while place < len(passage.tokens):
        matches = (pair for pair in pairs if passage.tokens[place : place + len(pair[0])] == pair[0])
        pair = next(matches, None)
        old, new = pair or ([passage.tokens[place]],) * 2
        slots.append((place, place + len(old), len(tokens), len(tokens) + len(new), pair is not None))
        tokens += new
        place += len(old)
    if not tokens:
        raise ValueError("--replace leaves nothing of the text")
    changed = text_passage(tokens, predicts_every_token(passage), False)
    if passage.reach is not None:
        changed = changed._replace(reach=moved_reach(passage.reach, slots))
    return changed, slots


def moved_reach(reach: Sequence[int], slots: Sequence[Slot]) -> list[int]:
    """Timesteps since the episode began, after a replacement: episodes begin where they began before."""
    moved: list[int] = []
    begins = True
    for start, end, new_start, new_end, _ in slots:
        begins = begins or 0 in reach[start:end]
        for _ in range(new_start, new_end):
            moved.append(0 if begins else moved[-1] + 1)
            begins = False
    return moved


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokens: Sequence[int], codec: Codec
) -> list[tuple[list[int], list[int]]]:
    """The tokens of what is replaced, and by what. Raises ValueError for what `tokens` do not have."""
    encoded = []
    for old, new in pairs:
        try:
            encoded.append((codec.encode(old), codec.encode(new)))
        except ValueError as error:
            raise ValueError(f"--replace {old}={new}: {error}") from None
        part = encoded[-1][0]
        if not part or not any(list(tokens[start : start + len(part)]) == part for start in range(len(tokens))):
            raise ValueError(f"--replace {old}={new}: the text that is shown does not have {old!r}")
    return encoded
