"""Text: predict the next byte, or character, of any file or folder of your own.

The beginning is for training, the end for testing, and what lies between for validation:

    | train (1 - valid_fraction - test_fraction)                    | valid | test |

Every token of a split but the first is scored, in bits per byte of UTF-8 with either tokenizer, so that results can be
compared. Characters are also scored in bits per character. Bits per byte are these divided by the bytes per character
of the whole split, even if `eval.max_blocks` evaluates only a part of it.
"""

import codecs
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .base import SPLITS, Task
from .data_cache import CHUNK, cache_dir, cached_file, map_tokens, read_json
from .text_files import find_files, read_texts, shorten
from .token_stream import TokenStream

log = logging.getLogger(__name__)

NUM_CODE_POINTS = 0x110000
FORMAT = 1  # of what lies in the cache folder


class Text(Task):
    """A file, or the files of a folder joined in the order of their paths; compressed ones and .zip are unpacked.

    In a folder, hidden files, run folders, binary files and what cannot be read are skipped; the log names them. A
    mark of the byte order (BOM) at the start of a file is not part of its text.

    The tokens are written to the cache folder once, and memory-mapped from there. They are made anew when a file has
    another size or time, or when there are other files.

    Args:
        path: Path of the file or folder.
        tokenizer: What a token is. "byte": a vocabulary of 256; "char": the characters of the train split, and one more
            token for all other characters.
        valid_fraction: Share of the text for validation.
        test_fraction: Share of the text for testing.

    Attributes:
        splits: the tokens of each split, (N,), in the smallest unsigned integers that hold them, memory-mapped.
        vocab: with "char", the known characters in the order of their tokens.
        unknown: number of other characters in each split. The model need not tell which these are, so many of them
            flatter its bits per byte.

    Raises:
        FileNotFoundError: if there is no such path.
        OSError: if it cannot be read, or its tokens cannot be written.
        ValueError: if the text is empty, too short for its splits, larger than half of the free disk, cannot be
            unpacked, is UTF-16 or, with "char", is not UTF-8.
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
        self.prepared = cache_dir() / f"text-{self.fingerprint()}"
        content = read_content(cached_file(self.prepared / "content.json", self.prepare))
        files = content["files"]
        skipped = f"; skipped {content['num_skipped']:,}: {files['skipped']}" if files["skipped"] else ""
        log.info(f"text: {files['number']:,} files, {files['bytes']:,} bytes{skipped}")
        self.unknown, self.mean_bytes = content["unknown"], content["mean_bytes"]
        if content["vocab"] is not None:
            self.vocab: str = content["vocab"]
            self.vocab_size = self.num_classes = len(self.vocab) + 1
            self.extra_metrics = ("bpc",)
        try:
            tokens = map_tokens(self.prepared / "tokens", token_dtype(self.vocab_size), content["length"])
        except (OSError, ValueError):
            raise ValueError(f"{self.prepared} is damaged: delete it and run again") from None
        self.splits = dict(zip(SPLITS, np.split(tokens, self.ends(len(tokens))), strict=True))
        counts = {split: {"tokens": len(part), "unknown": self.unknown[split]} for split, part in self.splits.items()}
        # sha256 of the bytes, or of the code points as uint32
        self.data_info = {"sha256": content["sha256"], "files": files, **counts}

    def fingerprint(self) -> str:
        """A hash of which files there are, how large and how old they are, and how they become tokens."""
        files = []
        for path in find_files(self.path, []):
            status = path.stat()
            files.append((str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        options = (self.tokenizer, *((self.valid_fraction, self.test_fraction) if self.tokenizer == "char" else ()))
        return hashlib.sha256(repr((FORMAT, options, files)).encode()).hexdigest()[:16]

    def prepare(self) -> Iterator[bytes]:
        """JSON of what the text holds, after its tokens have been written beside it."""
        text_path = self.prepared / ("tokens" if self.tokenizer == "byte" else "text")
        files: dict[str, Any] = {"number": 0, "bytes": 0}
        skipped: list[str] = []
        sha256 = hashlib.sha256()
        text_path.unlink(missing_ok=True)  # of an earlier try
        cached_file(text_path, lambda: self.read(files, skipped, sha256))
        if not files["bytes"]:
            but = f" (skipped {shorten(skipped)})" if skipped else ""
            raise ValueError(f"task.path={self.path} is empty{but}: name a file or folder with text")
        files["skipped"] = shorten(skipped)
        content = {
            "files": files,
            "num_skipped": len(skipped),
            "sha256": sha256.hexdigest(),
            "length": files["bytes"],
            "vocab": None,
        }
        content |= {"unknown": dict.fromkeys(SPLITS, 0), "mean_bytes": dict.fromkeys(SPLITS, 1.0)}
        if self.tokenizer == "char":
            content |= self.tokenize_characters(text_path)
            text_path.unlink()
        yield json.dumps(content).encode()

    def read(self, files: dict[str, Any], skipped: list[str], sha256: Any) -> Iterator[bytes]:
        """The text in chunks, which with "char" end between two characters. Count what is read, and hash it."""
        limit = shutil.disk_usage(self.prepared).free // 2
        for name, chunks in read_texts(self.path, skipped):
            files["number"] += 1
            for index, chunk in enumerate(chunks if self.tokenizer == "byte" else check_utf8(name, chunks)):
                text = chunk.removeprefix(codecs.BOM_UTF8) if index == 0 else chunk
                files["bytes"] += len(text)
                if files["bytes"] > limit:
                    free = f"half of what is free in {cache_dir()}"
                    raise ValueError(f"task.path={self.path} has more than {limit:,} bytes, {free}")
                sha256.update(text)
                yield text

    def ends(self, length: int) -> list[int]:
        """Where the train and the valid split of a text of this length end."""
        shares = 1 - self.valid_fraction - self.test_fraction, 1 - self.test_fraction
        return [round(length * share) for share in shares]

    def tokenize_characters(self, text_path: Path) -> dict[str, Any]:
        """Write the tokens of the characters of UTF-8, and return what is known of these."""
        length = sum(int((np.frombuffer(chunk, np.uint8) & 0xC0 != 0x80).sum()) for chunk in read_file(text_path))
        ends = self.ends(length)
        if not ends[0]:
            raise ValueError(f"task.path={self.path} has {length} characters, of which none are for training")
        counts, mean_bytes, sha256 = count_characters(read_file(text_path), ends)
        known = np.flatnonzero(counts["train"])
        token_of = np.full(NUM_CODE_POINTS, len(known), token_dtype(len(known) + 1))
        token_of[known] = np.arange(len(known))
        tokens = self.prepared / "tokens"
        tokens.unlink(missing_ok=True)
        cached_file(tokens, lambda: (token_of[code_points(chunk)].tobytes() for chunk in read_file(text_path)))
        return {
            "sha256": sha256,
            "length": length,
            "vocab": "".join(map(chr, known)),
            "unknown": {split: int(count.sum() - count[known].sum()) for split, count in counts.items()},
            "mean_bytes": mean_bytes,
        }

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


def read_file(path: Path) -> Iterator[bytes]:
    """UTF-8 in chunks that end between two characters."""
    with open(path, "rb") as file:
        yield from check_utf8(str(path), iter(lambda: file.read(CHUNK), b""))


def read_content(path: Path) -> dict[str, Any]:
    """What `Text.prepare` has written. Raises ValueError if it is anything else."""
    content = read_json(path, str(path))
    try:
        numbers = [content["length"], content["num_skipped"], *(content["unknown"][split] for split in SPLITS)]
        numbers += [content["files"][name] for name in ("number", "bytes")]
        texts = [content["sha256"], content["files"]["skipped"]]
        is_content = all(type(number) is int and number >= 0 for number in numbers)
        is_content &= all(isinstance(text, str) for text in texts) and isinstance(content["vocab"], str | None)
        is_content &= all(isinstance(content["mean_bytes"][split], float) for split in SPLITS)
    except (TypeError, LookupError):
        is_content = False
    if not is_content:
        raise ValueError(f"{path} does not say what a text holds: delete it and run again")
    return content


def token_dtype(vocab_size: int) -> Any:
    """The smallest unsigned integers that hold the tokens."""
    return np.min_scalar_type(vocab_size - 1).type


def code_points(content: bytes) -> np.ndarray:
    """The characters of UTF-8, (N,) uint32. Raises UnicodeDecodeError if it is not."""
    return np.frombuffer(codecs.utf_8_decode(content, "strict", True)[0].encode("utf-32-le"), np.uint32)


def count_characters(chunks: Iterable[bytes], ends: list[int]) -> tuple[dict[str, np.ndarray], dict[str, float], str]:
    """What the text holds, whose train and valid split end at these characters.

    Returns:
        counts: how often each code point is in each split, (NUM_CODE_POINTS,).
        mean_bytes: mean length in UTF-8 of the characters of each split but the first, which is not predicted.
        sha256: of the code points.
    """
    counts = {split: np.zeros(NUM_CODE_POINTS, np.int64) for split in SPLITS}
    first: dict[str, np.ndarray] = {}
    sha256, start = hashlib.sha256(), 0
    for chunk in chunks:
        text = code_points(chunk)
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
