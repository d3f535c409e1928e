"""PG-19: predict the next character of books of Project Gutenberg, all from before 1919.

    | train: 28,602 books, 11.7 GB                                   | valid: 50 | test: 100 |

Scored is every character but a part's first, in bits per byte of UTF-8 (figure 6) and bits per character (table 4).

Books follow each other in the order of their ids, with nothing between them (our choice). The published files end their
lines with CR LF; here it is LF, as whoever reads them in text mode gets them, for tokens and for bytes alike.
"""

import csv
import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from .download import alone, cache_folder, check, fetch, keep, write
from .stream import SPLITS
from .text import characters
from .tokens import TokenStream

URL = "https://storage.googleapis.com/deepmind-gutenberg"
INDEX = files("expire_span.tasks") / "pg19_books.csv.xz"  # split, id, bytes, first 8 hexadecimal digits of the sha256
TOGETHER = 8  # downloads at a time
CODE_POINTS = 0x110000


class Book(NamedTuple):
    place: str  # in the folder, and below URL
    size: int  # bytes, as published
    sha256: str  # its beginning


class PG19:
    """Books are fetched on first use, checked, and turned into tokens in the cache folder, never all in memory.

    Whatever breaks off goes on where it was: downloads by the book, and so the tokens.

    folder      holds {train,validation,test}/{id}.txt, or will (None: in the cache folder, see download.py)
    books       of the train part, the first so many (None: all); valid and test are always whole
    missing     "fetch" books that are not in the folder, or "skip" them: then a part is what lies there of it

    A token is a character of these training books, by code point; the last one is every other character.
    `alphabet` are the known characters in the order of their tokens; `data` says of each part how many books of how
    many it has, its bytes and characters, and the unknown ones: a model is not asked which these are, so many of them
    flatter its bits per byte.

    Raises ValueError where `books` is out of range or a book is not the published one, FileNotFoundError where it
    cannot be fetched or, of a part, none lies there.
    """

    measure = "bpb"
    also = ("bpc",)
    answer = "token"

    def __init__(
        self,
        folder: str | Path | None = None,
        books: int | None = None,
        missing: Literal["fetch", "skip"] = "fetch",
    ):
        if missing not in ("fetch", "skip"):
            raise ValueError(f"task.missing must be fetch or skip, got {missing}")
        self.folder = Path(folder).expanduser() if folder else cache_folder() / "pg19"
        published = read_index()
        if books is not None and not 1 <= books <= len(published["train"]):
            raise ValueError(f"task.books must be from 1 to {len(published['train']):,}, got {books}")
        self.books = dict(published)
        if missing == "skip":
            there = {f"{place.parent.name}/{place.name}" for place in self.folder.glob("*/*.txt")}
            self.books = {split: [book for book in published[split] if book.place in there] for split in SPLITS}
        self.books["train"] = self.books["train"][:books]
        for split, found in self.books.items():
            if not found:
                raise FileNotFoundError(f"{self.folder} has no book of PG-19's {split} part; use task.missing=fetch")

        counts = "-".join(str(len(self.books[split])) for split in SPLITS)
        key = hashlib.sha256(repr(self.books).encode()).hexdigest()[:8]
        self.prepared = cache_folder() / f"pg19-{counts}-{key}"
        content = json.loads(keep(self.prepared / "survey.json", self.survey).read_bytes())
        self.alphabet: str = content["alphabet"]
        self.vocabulary = self.classes = len(self.alphabet) + 1
        self.data: dict[str, dict[str, int]] = {
            split: {"books": len(self.books[split]), "of": len(published[split]), **content[split]} for split in SPLITS
        }
        self.parts = {split: self.encode(split, content["lengths"][split]) for split in SPLITS}

    def bytes_per_token(self, split: str) -> float:
        """Bytes of UTF-8 a character, by which bits per token are divided to be bits per byte."""
        return self.data[split]["bytes"] / self.data[split]["characters"]

    def stream(self, split: str, batch: int, block: int) -> TokenStream:
        return TokenStream(self.parts[split], batch, block, endless=split == "train", name=f"PG-19's {split} part")

    def survey(self) -> Iterator[bytes]:
        """JSON: the alphabet, the length of each book in characters, and the counts of each part."""
        content: dict[str, Any] = {"lengths": {}}
        for split in SPLITS:
            lengths, counts = [], np.zeros(CODE_POINTS, np.int64)
            for text in self.read(split):
                lengths.append(len(text))
                present = np.bincount(text)
                counts[: len(present)] += present
            if not sum(lengths):
                raise ValueError(f"PG-19's {split} part in {self.folder} is nothing but an empty book: add others")
            if split == "train":
                known = counts > 0
                content["alphabet"] = "".join(map(chr, np.flatnonzero(known)))
            size = sum(counts[limit:].sum() for limit in (0, 0x80, 0x800, 0x10000))  # UTF-8 takes a byte more from each
            numbers = {"bytes": size, "characters": counts.sum(), "unknown": counts[~known].sum()}
            content[split] = {name: int(number) for name, number in numbers.items()}
            content["lengths"][split] = lengths
        yield json.dumps(content).encode()

    def encode(self, split: str, lengths: list[int]) -> np.ndarray:
        """The part's tokens: (characters,) uint16, memory-mapped."""
        path = self.prepared / f"{split}.uint16"
        if not path.exists():
            with alone(path):
                if not path.exists():
                    self.append(split, lengths, path.with_suffix(".part")).replace(path)
        return np.memmap(path, np.uint16, mode="r")

    def append(self, split: str, lengths: list[int], part: Path) -> Path:
        """Adds what the file `part` still lacks; of an earlier start's last book there may be a piece."""
        table = np.full(CODE_POINTS, len(self.alphabet), np.uint16)
        table[[ord(character) for character in self.alphabet]] = np.arange(len(self.alphabet))
        ends = 2 * np.cumsum([0, *lengths])  # bytes
        with FileIO(part, "a") as file:
            done = int(np.searchsorted(ends, part.stat().st_size, side="right")) - 1  # books
            file.truncate(ends[done])
            for text in self.read(split, done):
                write(file, table[text].tobytes(), part)
        return part

    def read(self, split: str, first: int = 0) -> Iterator[np.ndarray]:
        """The code points of each book from the first on: (characters,) uint32."""
        books = self.books[split][first:]
        pool = ThreadPoolExecutor(TOGETHER)
        try:
            with tqdm(
                desc=f"PG-19, {split}", total=sum(each.size for each in books), unit="B", unit_scale=True, disable=None
            ) as bar:
                for book, path in zip(books, pool.map(self.obtain, books), strict=True):
                    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                    yield characters(path, content, advice="delete it and run again")
                    bar.update(book.size)
        finally:
            pool.shutdown(cancel_futures=True)

    def obtain(self, book: Book) -> Path:
        """The book's file, fetched if need be, and checked."""
        path = self.folder / book.place
        if path.exists():
            check(path, book.size, book.sha256)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.touch()  # one published book is empty, and no server sends a range of nothing
        fetch(f"{URL}/{book.place}", part, path, book.size, silent=True)
        check(part, book.size, book.sha256)
        return part.replace(path)


def read_index() -> dict[str, list[Book]]:
    """Every published book, by split, in the order of its id."""
    published: dict[str, list[Book]] = {split: [] for split in SPLITS}
    for row in csv.DictReader(lzma.decompress(INDEX.read_bytes()).decode().splitlines()):
        split = "valid" if row["split"] == "validation" else row["split"]
        published[split].append(Book(f"{row['split']}/{row['id']}.txt", int(row["bytes"]), row["sha256"]))
    return published
