"""Text: predict the next byte, or character, of any file or folder of your own.

The beginning is for training, the end for testing, and what lies between for validation:

    | train (1 - valid_fraction - test_fraction)                    | valid | test |

Every token of a split but the first is scored, in bits per byte of UTF-8 with either tokenizer, so that results can be
compared. Characters are also scored in bits per character. Bits per byte are these divided by the bytes per character
of the whole split, even if `eval.max_blocks` evaluates only a part of it.
"""

import gzip
import hashlib
import lzma
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from .base import SPLITS, Task
from .token_stream import TokenStream


class Text(Task):
    """A file, or the files of a folder joined in the order of their paths; .xz and .gz are unpacked.

    Args:
        path: Path of the file or folder.
        tokenizer: What a token is. "byte": a vocabulary of 256; "char": the characters of the train split, and one more
            token for all other characters.
        valid_fraction: Share of the text for validation.
        test_fraction: Share of the text for testing.

    Attributes:
        splits: the tokens of each split, (N,).
        vocab: with "char", the known characters in the order of their tokens.
        unknown: number of other characters in each split. The model need not tell which these are, so many of them
            flatter its bits per byte.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if the text is empty or too short for its splits or, with "char", not UTF-8.
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
        if valid_fraction < 0 or test_fraction < 0 or valid_fraction + test_fraction >= 1:
            values = f"got {valid_fraction} and {test_fraction}"
            raise ValueError(f"task.valid_fraction and task.test_fraction must leave a share for training, {values}")
        self.path, self.tokenizer = path, tokenizer
        self.valid_fraction, self.test_fraction = valid_fraction, test_fraction
        contents = [(file, read_file(file)) for file in find_files(path)]
        if tokenizer == "byte":
            text = np.frombuffer(b"".join(content for _, content in contents), np.uint8)
        else:
            text = np.concatenate([code_points(file, content) for file, content in contents])
        if not len(text):
            raise ValueError(f"task.path={path} is empty: name a file or folder with text")
        ends = [round(len(text) * (1 - valid_fraction - test_fraction)), round(len(text) * (1 - test_fraction))]
        self.splits = dict(zip(SPLITS, np.split(text, ends), strict=True))
        self.unknown = dict.fromkeys(SPLITS, 0)
        self.vocab_size = self.num_classes = 256
        self.mean_bytes = dict.fromkeys(SPLITS, 1.0)
        if tokenizer == "char":
            self.extra_metrics = ("bpc",)
            self.mean_bytes = {split: mean_utf8_bytes(part[1:]) for split, part in self.splits.items()}
            self.tokenize_characters()
        counts = {split: {"tokens": len(part), "unknown": self.unknown[split]} for split, part in self.splits.items()}
        # sha256 of the bytes, or of the code points as uint32
        self.data_info = {"sha256": hashlib.sha256(text.tobytes()).hexdigest(), **counts}

    def tokenize_characters(self) -> None:
        """Replace the code points of `splits` by tokens."""
        if not len(self.splits["train"]):
            length = sum(len(part) for part in self.splits.values())
            raise ValueError(f"task.path={self.path} has {length} characters, of which none are for training")
        known = np.unique(self.splits["train"])
        self.vocab = "".join(map(chr, known))
        self.vocab_size = self.num_classes = len(known) + 1
        for split, part in self.splits.items():
            token = np.searchsorted(known, part).clip(max=len(known) - 1)
            is_known = known[token] == part
            self.splits[split] = np.where(is_known, token, len(known)).astype(np.int32)
            self.unknown[split] = int((~is_known).sum())

    def bytes_per_token(self, split: str) -> float:
        return self.mean_bytes[split]

    def stream(self, split: str, batch_size: int, block_size: int) -> TokenStream:
        name = f"the {split} split of task.path={self.path}"
        return TokenStream(self.splits[split], batch_size, block_size, endless=split == "train", name=name)


def find_files(path: str | Path) -> list[Path]:
    """The file at a path or, if it is a folder, all files in it that are not hidden, in the order of their paths.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it is a folder without files.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"task.path={path} does not exist (looked at {root.absolute()})")
    if root.is_file():
        return [root]
    files = sorted(file for file in root.rglob("*") if file.is_file())
    files = [file for file in files if not any(part[0] == "." for part in file.relative_to(root).parts)]  # hidden
    if not files:
        raise ValueError(f"task.path={path} is a folder without files")
    return files


def read_file(file: Path) -> bytes:
    """The content of a file, unpacked if it is an .xz or .gz file.

    Raises:
        ValueError: if it cannot be unpacked.
    """
    try:
        if file.suffix == ".xz":
            return lzma.decompress(file.read_bytes())
        if file.suffix == ".gz":
            return gzip.decompress(file.read_bytes())
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"task.path: {file} cannot be unpacked ({error}); unpack it by hand, or replace it") from None
    return file.read_bytes()


def code_points(file: Path, content: bytes, advice: str = "convert it, or use task.tokenizer=byte") -> np.ndarray:
    """The characters of the content of `file`, (N,) uint32.

    Raises:
        ValueError: if it is not UTF-8, with `advice` on what to do.
    """
    try:
        return np.frombuffer(content.decode("utf-8").encode("utf-32-le"), np.uint32)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} of {file} is not UTF-8; {advice}") from None


def mean_utf8_bytes(characters: np.ndarray) -> float:
    """Mean length in UTF-8 of characters given by their code points, (N,)."""
    if not len(characters):
        return 1.0
    return 1.0 + sum(float((characters >= limit).mean()) for limit in (0x80, 0x800, 0x10000))
