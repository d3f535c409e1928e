"""Text: predict the next byte, or character, of any file or folder of your own.

Its beginning is for training, its end for testing, and what lies between for validation, each in one piece:

    | train (1 - valid - test)                                      | valid | test |

Scored is every token but a part's first, in bits per byte of UTF-8, whatever the unit: so figures can be compared. By
characters, bits per character are told beside; bits per byte are these by the bytes a character has in the whole part,
also where `evaluation.blocks` is but some of it.
"""

import gzip
import hashlib
import lzma
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from .stream import SPLITS
from .tokens import TokenStream


class Text:
    """A file, or a folder's files one after another in the order of their paths; .xz and .gz are unpacked.

    path            the file or folder
    unit            "bytes": a vocabulary of 256; "characters": those of the train part, and one for all unknown ones
    valid, test     shares of the whole

    `parts[split]` (N,) are a part's tokens, `alphabet` the known characters in the order of their tokens,
    `unknown[split]` the number of unknown ones in a part: a model is not asked which they are, so many of them flatter
    its bits per byte.

    Raises FileNotFoundError without such a path, ValueError where the text is empty, too short for its parts or, by
    characters, not UTF-8.
    """

    measure = "bpb"
    answer = "token"

    def __init__(
        self, path: str | Path, unit: Literal["bytes", "characters"] = "bytes", valid: float = 0.05, test: float = 0.05
    ):
        if unit not in ("bytes", "characters"):
            raise ValueError(f"task.unit must be bytes or characters, got {unit}")
        if valid < 0 or test < 0 or valid + test >= 1:
            raise ValueError(f"task.valid and task.test must leave a share for training, got {valid} and {test}")
        self.path, self.unit = path, unit
        files = [(file, read(file)) for file in find(path)]
        if unit == "bytes":
            whole = np.frombuffer(b"".join(content for _, content in files), np.uint8)
        else:
            whole = np.concatenate([characters(file, content) for file, content in files])
        if not len(whole):
            raise ValueError(f"task.path={path} is empty: name a file or folder with text")
        told = {"sha256": hashlib.sha256(whole.tobytes()).hexdigest()}  # of the bytes, or code points
        ends = [round(len(whole) * (1 - valid - test)), round(len(whole) * (1 - test))]
        self.parts = dict(zip(SPLITS, np.split(whole, ends), strict=True))
        self.unknown = dict.fromkeys(SPLITS, 0)
        self.vocabulary = self.classes = 256
        self.bytes = dict.fromkeys(SPLITS, 1.0)
        self.also = ("bpc",) if unit == "characters" else ()
        if unit == "characters":
            self.bytes = {split: mean_bytes(part[1:]) for split, part in self.parts.items()}
            if not len(self.parts["train"]):
                raise ValueError(f"task.path={path} has {len(whole)} characters, of which none are for training")
            known = np.unique(self.parts["train"])
            self.alphabet = "".join(map(chr, known))
            self.vocabulary = self.classes = len(known) + 1
            for split, part in self.parts.items():
                place = np.searchsorted(known, part).clip(max=len(known) - 1)
                self.parts[split] = np.where(known[place] == part, place, len(known)).astype(np.int32)
                self.unknown[split] = int((known[place] != part).sum())
        parts = {s: {"tokens": len(part), "unknown": self.unknown[s]} for s, part in self.parts.items()}
        self.data = {**told, **parts}

    def bytes_per_token(self, split: str) -> float:
        """Bytes of UTF-8 a target, by which bits per token are divided to be bits per byte."""
        return self.bytes[split]

    def stream(self, split: str, batch: int, block: int) -> TokenStream:
        name = f"the {split} part of task.path={self.path}"
        return TokenStream(self.parts[split], batch, block, endless=split == "train", name=name)


def find(path: str | Path) -> list[Path]:
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"task.path={path} does not exist (looked at {place.absolute()})")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    if place.is_dir():  # without what is hidden, as .git is
        files = [file for file in files if not any(part[0] == "." for part in file.relative_to(place).parts)]
    if not files:
        raise ValueError(f"task.path={path} is a folder without files")
    return files


def read(file: Path) -> bytes:
    try:
        if file.suffix == ".xz":
            return lzma.decompress(file.read_bytes())
        if file.suffix == ".gz":
            return gzip.decompress(file.read_bytes())
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"task.path: {file} cannot be unpacked ({error}); unpack it by hand, or replace it") from None
    return file.read_bytes()


def characters(file: Path, content: bytes, advice: str = "convert it, or use task.unit=bytes") -> np.ndarray:
    """(N,) code points. Raises ValueError, with `advice`, where the content of `file` is not UTF-8."""
    try:
        return np.frombuffer(content.decode("utf-8").encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} of {file} is not UTF-8; {advice}") from None


def mean_bytes(code_points: np.ndarray) -> float:
    if not len(code_points):
        return 1.0
    return 1.0 + sum(float((code_points >= limit).mean()) for limit in (0x80, 0x800, 0x10000))
