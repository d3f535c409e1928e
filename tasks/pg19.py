"""PG-19 (section 5.3, figure 6 and table 4): predict the next character of books of Project Gutenberg, before 1919.

    | train: 28,602 books, 11.7 GB                                   | valid: 50 | test: 100 |

Every character of a split but the first is scored, in bits per byte of UTF-8 (figure 6) and per character (table 4).

Books follow each other in the order of their ids, with nothing between them (our choice). The published files end their
lines with CR LF. Here it is LF, for tokens and bytes alike, as in a file that is read in text mode.
"""

import csv
import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from .base import SPLITS, Task
from .data_cache import (
    HubError,
    cache_dir,
    cached_file,
    check_file,
    fetch,
    file_lock,
    map_tokens,
    read_hub,
    read_json,
    user_path,
    write,
)
from .text import NUM_CODE_POINTS, code_points, utf8_bytes
from .token_stream import TokenStream

HUB_DATASET = "emozilla/pg19"
URL = "https://storage.googleapis.com/deepmind-gutenberg"
INDEX = files("expire_span.tasks") / "pg19_books.csv.xz"  # split, id, bytes, first 8 hexadecimal digits of the sha256
NUM_DOWNLOADS = 8  # at a time


class Book(NamedTuple):
    """One published book."""

    path: str  # in data_dir, and below URL
    size: int  # bytes, as published
    sha256: str  # its beginning


class PG19(Task):
    """Books are downloaded on first use, checked, and turned into tokens in the cache folder, never all in memory.

    Where most of a split is missing, it is read from the Hugging Face Hub. Single books, and whatever the Hub does not
    have exactly as published, come from the published files. An interrupted download or tokenization is resumed.

    A token is a character of the chosen training books, in the order of code points; the last token is every other
    character.

    Args:
        data_dir: Folder that has {train,validation,test}/{id}.txt, or will have them (None: in the cache folder).
        num_books: Number of training books, the first by id (None: all). valid and test are always whole.
        on_missing: Whether to "download" the books that are not in the folder, or to "skip" them: then a split is what
            the folder has.

    Attributes:
        splits: the tokens of each split, (N,) uint16.
        vocab: the known characters in the order of their tokens.
        data_info: for each split, `num_books` and how many are published (`num_published`), its bytes, its characters,
            and the unknown ones. The model need not tell which these are, so many of them flatter its bits per byte.

    Raises:
        FileNotFoundError: if a book cannot be downloaded, or none of a split is in the folder.
        ValueError: if num_books is out of range, or a book is not the published one.
    """

    metric = "bpb"
    extra_metrics = ("bpc",)
    scoring = "token"

    def __init__(
        self,
        data_dir: str | Path | None = None,
        num_books: int | None = None,
        on_missing: Literal["download", "skip"] = "download",
    ):
        if on_missing not in ("download", "skip"):
            raise ValueError(f"task.on_missing must be download or skip, got {on_missing}")
        self.folder = user_path(data_dir) if data_dir else cache_dir() / "pg19"
        published = read_index()
        if num_books is not None and not 1 <= num_books <= len(published["train"]):
            raise ValueError(f"task.num_books must be from 1 to {len(published['train']):,}, got {num_books}")
        self.books = dict(published)
        if on_missing == "skip":
            present = {f"{path.parent.name}/{path.name}" for path in self.folder.glob("*/*.txt")}
            self.books = {split: [book for book in published[split] if book.path in present] for split in SPLITS}
        self.books["train"] = self.books["train"][:num_books]
        for split, books in self.books.items():
            if not books:
                raise FileNotFoundError(
                    f"{self.folder} has no book of PG-19's {split} split; use task.on_missing=download"
                )

        counts = "-".join(str(len(self.books[split])) for split in SPLITS)
        key = hashlib.sha256(repr(self.books).encode()).hexdigest()[:8]
        self.prepared = cache_dir() / f"pg19-{counts}-{key}"
        content = read_survey(cached_file(self.prepared / "vocab.json", self.build_vocab))
        self.vocab: str = content["vocab"]
        self.vocab_size = self.num_classes = len(self.vocab) + 1
        self.data_info: dict[str, dict[str, int]] = {
            split: {
                "num_books": len(self.books[split]),
                "num_published": len(published[split]),
                **content[split],
            }
            for split in SPLITS
        }
        self.splits = {split: self.encode(split, content["lengths"][split]) for split in SPLITS}

    def bytes_per_token(self, split: str) -> float:
        return self.data_info[split]["bytes"] / self.data_info[split]["characters"]

    def stream(self, split: str, batch_size: int, block_size: int) -> TokenStream:
        name = f"PG-19's {split} split"
        return TokenStream(self.splits[split], batch_size, block_size, endless=split == "train", name=name)

    def build_vocab(self) -> Iterator[bytes]:
        """JSON: the vocabulary, the length of each book in characters, and the counts of each split."""
        content: dict[str, Any] = {"lengths": {}}
        for split in SPLITS:
            self.download_from_hub(split)
            lengths, counts = [], np.zeros(NUM_CODE_POINTS, np.int64)
            for text in self.read_books(split):
                lengths.append(len(text))
                book_counts = np.bincount(text)
                counts[: len(book_counts)] += book_counts
            if not sum(lengths):
                raise ValueError(f"PG-19's {split} split in {self.folder} is nothing but an empty book: add others")
            if split == "train":
                known = counts > 0
                content["vocab"] = "".join(map(chr, np.flatnonzero(known)))
            totals = {"bytes": utf8_bytes(counts), "characters": counts.sum(), "unknown": counts[~known].sum()}
            content[split] = {name: int(total) for name, total in totals.items()}
            content["lengths"][split] = lengths
        yield json.dumps(content).encode()

    def encode(self, split: str, lengths: list[int]) -> np.ndarray:
        """The tokens of a split: (characters,) uint16, memory-mapped."""
        path = self.prepared / f"{split}.uint16"
        if not path.exists():
            with file_lock(path):
                if not path.exists():
                    self.append_tokens(split, lengths, path.with_suffix(".part")).replace(path)
        return map_tokens(path, np.uint16, sum(lengths))

    def append_tokens(self, split: str, lengths: list[int], part: Path) -> Path:
        """Append the tokens that the file `part` lacks; an interrupted process may have written only part of a book."""
        token_of = np.full(NUM_CODE_POINTS, len(self.vocab), np.uint16)
        token_of[[ord(character) for character in self.vocab]] = np.arange(len(self.vocab))
        ends = 2 * np.cumsum([0, *lengths])  # bytes
        with open(part, "ab", buffering=0) as file:
            num_complete = int(np.searchsorted(ends, part.stat().st_size, side="right")) - 1  # books
            file.truncate(ends[num_complete])
            for text in self.read_books(split, num_complete):
                write(file, token_of[text].tobytes(), part)
        return part

    def read_books(self, split: str, first: int = 0) -> Iterator[np.ndarray]:
        """The code points of each book from number `first` on: (characters,) uint32."""
        books = self.books[split][first:]
        pool = ThreadPoolExecutor(NUM_DOWNLOADS)
        size = sum(book.size for book in books)
        try:
            with tqdm(desc=f"PG-19, {split}", total=size, unit="B", unit_scale=True, disable=None) as bar:
                for book, path in zip(books, pool.map(self.provide_book, books), strict=True):
                    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                    try:
                        yield code_points(content)
                    except UnicodeDecodeError as error:
                        place = f"byte {error.start:,} of {path}"
                        raise ValueError(f"{place} is not UTF-8; delete it and run again") from None
                    bar.update(book.size)
        finally:
            pool.shutdown(cancel_futures=True)

    def provide_book(self, book: Book) -> Path:
        """The file of a book, downloaded if missing, and checked."""
        path = self.folder / book.path
        if path.exists():
            check_file(path, book.size, book.sha256)
            return path
        part = partial_path(path)
        part.touch()  # one published book is empty, and no server sends a range of nothing
        fetch(f"{URL}/{book.path}", part, path, book.size, book.sha256, progress_bar=False)
        return part.replace(path)

    def download_from_hub(self, split: str) -> None:
        """Write the books of a split from the Hub if most are missing: all of its 11 GB must be read to find some."""
        missing = {book.path: book for book in self.books[split] if not (self.folder / book.path).exists()}
        if sum(book.size for book in missing.values()) < sum(book.size for book in read_index()[split]) / 2:
            return
        with suppress(HubError):
            rows: Iterable[dict[str, Any]] = read_hub(HUB_DATASET, split=split, streaming=True)
            for row in tqdm(
                rows, desc=f"PG-19, {split}, from the Hub", total=len(missing), unit=" books", disable=None
            ):
                folder = "validation" if split == "valid" else split
                book = missing.get(f"{folder}/{row['url'].rsplit('/')[-1]}.txt")
                if book is not None:
                    self.write_book(book, row["text"])

    def write_book(self, book: Book, text: str) -> None:
        """Write a book as published, with lines that end with CR LF; do nothing if that does not restore it."""
        content = text.replace("\n", "\r\n").encode()
        digest = hashlib.sha256(content).hexdigest()
        if len(content) == book.size and digest.startswith(book.sha256):
            path = self.folder / book.path
            part = partial_path(path)
            with open(part, "wb", buffering=0) as file:
                write(file, content, path)
            part.replace(path)


def partial_path(path: Path) -> Path:
    """Where this process writes a file until it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def read_survey(path: Path) -> dict[str, Any]:
    """What `PG19.build_vocab` has written. Raises ValueError if it is anything else."""
    content = read_json(path, str(path))
    try:
        counts = [content[split][name] for split in SPLITS for name in ("bytes", "characters", "unknown")]
        counts += [length for split in SPLITS for length in content["lengths"][split]]
        is_survey = isinstance(content["vocab"], str) and all(type(count) is int and count >= 0 for count in counts)
    except (TypeError, LookupError):
        is_survey = False
    if not is_survey:
        raise ValueError(f"{path} does not hold a vocabulary and counts: delete it and run again")
    return content


def read_index() -> dict[str, list[Book]]:
    """Every published book, by split, in the order of its id."""
    published: dict[str, list[Book]] = {split: [] for split in SPLITS}
    for row in csv.DictReader(lzma.decompress(INDEX.read_bytes()).decode().splitlines()):
        split = "valid" if row["split"] == "validation" else row["split"]
        published[split].append(Book(f"{row['split']}/{row['id']}.txt", int(row["bytes"]), row["sha256"]))
    return published
