"""Text: predict the next byte, or character, of any file or folder of your own.

The beginning is for training, the end for testing, and what lies between for validation:

    | train (1 - valid_fraction - test_fraction)                    | valid | test |

Every token of a split but the first is scored, in bits per byte of UTF-8 with either tokenizer, so that results can be
compared. Characters are also scored in bits per character. Bits per byte are these divided by the bytes per character
of the whole split, even if `eval.max_blocks` evaluates only a part of it.
"""

import codecs
import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from mmap import mmap
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .base import SPLITS, Task
from .data_cache import CHUNK
from .text_files import free_memory, read_texts, shorten
from .token_stream import TokenStream

log = logging.getLogger(__name__)

NUM_CODE_POINTS = 0x110000


class Text(Task):
    """A file, or the files of a folder joined in the order of their paths; compressed ones and .zip are unpacked.

    In a folder, hidden files, run folders, binary files and what cannot be read are skipped; the log names them. A
    mark of the byte order (BOM) at the start of a file is not part of its text.

    Args:
        path: Path of the file or folder.
        tokenizer: What a token is. "byte": a vocabulary of 256; "char": the characters of the train split, and one more
            token for all other characters.
        valid_fraction: Share of the text for validation.
        test_fraction: Share of the text for testing.

    Attributes:
        splits: the tokens of each split, (N,), in the smallest unsigned integers that hold them.
        vocab: with "char", the known characters in the order of their tokens.
        unknown: number of other characters in each split. The model need not tell which these are, so many of them
            flatter its bits per byte.

    Raises:
        FileNotFoundError: if there is no such path.
        OSError: if it cannot be read.
        ValueError: if the text is empty, too short for its splits, larger than memory allows, cannot be unpacked, is
            UTF-16 or, with "char", is not UTF-8.
    """

    metric = "bpb"
    scoring = "token"

    def __init__(
        self,
        path: str | Path,
        tokenizer: Literal["byte", "char"] = "byte",
        valid_fraction: float = 0.05,
        test_fraction: float = 0.05,
    ):
        if tokenizer not in ("byte", "char"):
            raise ValueError(f"task.tokenizer must be byte or char, got {tokenizer}")
        if not (valid_fraction >= 0 and test_fraction >= 0 and valid_fraction + test_fraction < 1):
            values = f"got {valid_fraction} and {test_fraction}"
            raise ValueError(f"task.valid_fraction and task.test_fraction must leave a share for training, {values}")
        self.path, self.tokenizer = path, tokenizer
        self.valid_fraction, self.test_fraction = valid_fraction, test_fraction
        self.vocab_size = self.num_classes = 256
        self.unknown, self.mean_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 1.0)
        self.files: dict[str, Any] = {"number": 0, "bytes": 0, "skipped": ""}  # what has been read
        try:
            blocks = [store(block) for block in regroup(self.read())]
            if not self.files["bytes"]:
                skipped = f" (skipped {self.files['skipped']})" if self.files["skipped"] else ""
                raise ValueError(f"task.path={path} is empty{skipped}: name a file or folder with text")
            sha256 = self.join_bytes(blocks) if tokenizer == "byte" else self.tokenize_characters(blocks)
        except MemoryError:
            raise ValueError(f"task.path={path} does not fit into memory; use a part of it") from None
        counts = {split: {"tokens": len(part), "unknown": self.unknown[split]} for split, part in self.splits.items()}
        # sha256 of the bytes, or of the code points as uint32
        self.data_info = {"sha256": sha256, "files": self.files, **counts}

    def read(self) -> Iterator[bytes]:
        """The text in chunks, which with "char" end between two characters. Count and log what is read."""
        skipped: list[str] = []
        limit = free_memory() // 2  # the rest is for tokens
        for name, chunks in read_texts(self.path, skipped):
            self.files["number"] += 1
            for index, chunk in enumerate(chunks if self.tokenizer == "byte" else check_utf8(name, chunks)):
                yield (text := chunk.removeprefix(codecs.BOM_UTF8) if index == 0 else chunk)
                self.files["bytes"] += len(text)
                if self.files["bytes"] > limit:
                    raise ValueError(f"task.path={self.path} has more than {limit:,} bytes, half of the free memory")
        self.files["skipped"] = shorten(skipped)
        read = f"{self.files['number']:,} files, {self.files['bytes']:,} bytes"
        log.info("text: %s%s", read, f"; skipped {len(skipped):,}: {self.files['skipped']}" if skipped else "")

    def split(self, text: np.ndarray) -> dict[str, np.ndarray]:
        """The parts of the text, (N,)."""
        return dict(zip(SPLITS, np.split(text, self.ends(len(text))), strict=True))

    def ends(self, length: int) -> list[int]:
        """Where the train and the valid split of a text of this length end."""
        shares = 1 - self.valid_fraction - self.test_fraction, 1 - self.test_fraction
        return [round(length * share) for share in shares]

    def join_bytes(self, blocks: list[np.ndarray]) -> str:
        """Set `splits` to the bytes; return their sha256."""
        text, start, sha256 = np.empty(sum(map(len, blocks)), np.uint8), 0, hashlib.sha256()
        for block in consume(blocks):
            sha256.update(block.data)
            text[start : start + len(block)] = block
            start += len(block)
        self.splits = self.split(text)
        return sha256.hexdigest()

    def tokenize_characters(self, blocks: list[np.ndarray]) -> str:
        """Set `splits` to the tokens of the characters, and what is known of these; return their sha256."""
        length = sum(int((block & 0xC0 != 0x80).sum()) for block in blocks)  # all other bytes continue a character
        ends = self.ends(length)
        if not ends[0]:
            raise ValueError(f"task.path={self.path} has {length} characters, of which none are for training")
        counts, self.mean_bytes, sha256 = count_characters(blocks, ends)
        known = np.flatnonzero(counts["train"])
        self.vocab = "".join(map(chr, known))
        self.vocab_size = self.num_classes = len(known) + 1
        self.extra_metrics = ("bpc",)
        self.unknown = {split: int(count.sum() - count[known].sum()) for split, count in counts.items()}
        token_of = np.full(NUM_CODE_POINTS, len(known), np.min_scalar_type(len(known)))
        token_of[known] = np.arange(len(known))
        tokens, start = np.empty(length, token_of.dtype), 0
        for block in consume(blocks):
            part = token_of[code_points(block.data)]
            tokens[start : start + len(part)] = part
            start += len(part)
        self.splits = self.split(tokens)
        return sha256

    def bytes_per_token(self, split: str) -> float:
        return self.mean_bytes[split]

    def stream(self, split: str, batch_size: int, block_size: int) -> TokenStream:
        name = f"the {split} split of task.path={self.path}"
        return TokenStream(self.splits[split], batch_size, block_size, endless=split == "train", name=name)


def check_utf8(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same content in chunks that end between two characters. Raises ValueError if it is not UTF-8."""
    rest, start = b"", 0
    for chunk in chain(chunks, [b""]):
        content = rest + chunk
        try:
            length = codecs.utf_8_decode(content, "strict", not chunk)[1]
        except UnicodeDecodeError as error:
            place = f"byte {start + error.start:,} of {name}"
            raise ValueError(f"{place} is not UTF-8; convert it, or use task.tokenizer=byte") from None
        yield content[:length]
        rest, start = content[length:], start + length


def regroup(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same content in blocks of at least CHUNK bytes, but for the last."""
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk)
        if size >= CHUNK:
            yield b"".join(group)
            group, size = [], 0
    if size:
        yield b"".join(group)


def store(block: bytes) -> np.ndarray:
    """A copy in memory that the system gets back as soon as it is freed, whatever the allocator does."""
    try:
        array = np.frombuffer(mmap(-1, len(block)), np.uint8)
    except OSError as error:
        raise MemoryError(error.strerror) from None
    array[:] = np.frombuffer(block, np.uint8)
    return array


def consume(blocks: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the blocks in order, and forget each: the memory for them and for their tokens is not needed twice."""
    blocks.reverse()
    while blocks:
        yield blocks.pop()


def code_points(content: bytes | memoryview) -> np.ndarray:
    """The characters of UTF-8, (N,) uint32. Raises UnicodeDecodeError if it is not."""
    return np.frombuffer(codecs.utf_8_decode(content, "strict", True)[0].encode("utf-32-le"), np.uint32)


def count_characters(blocks: list[np.ndarray], ends: list[int]) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
    """What the text holds, whose train and valid split end at these characters.

    Returns:
        counts: how often each code point is in each split, (NUM_CODE_POINTS,).
        mean_bytes: mean length in UTF-8 of the characters of each split but the first, which is not predicted.
        sha256: of the code points.
    """
    counts = {split: np.zeros(NUM_CODE_POINTS, np.int64) for split in SPLITS}
    first: dict[str, np.ndarray] = {}
    sha256, start = hashlib.sha256(), 0
    for block in blocks:
        text = code_points(block.data)
        sha256.update(text.data)
        for split, part in zip(SPLITS, np.split(text, np.clip(np.subtract(ends, start), 0, len(text))), strict=True):
            block_counts = np.bincount(part)
            counts[split][: len(block_counts)] += block_counts
            if len(part):
                first.setdefault(split, part[:1])
        start += len(text)
    mean_bytes = dict.fromkeys(SPLITS, 1.0)
    for split, count in counts.items():
        if count.sum() > 1:
            size = utf8_bytes(count) - utf8_bytes(np.bincount(first[split]))
            mean_bytes[split] = size / int(count.sum() - 1)
    return counts, mean_bytes, sha256.hexdigest()


def utf8_bytes(counts: np.ndarray) -> int:
    """Length in UTF-8 of characters of which there are so many of each code point."""
    return sum(int(counts[limit:].sum()) for limit in (0, 0x80, 0x800, 0x10000))  # it takes a byte more from each on
