"""Wikitext-103: predict the next word of good and featured articles of Wikipedia.

    | train: 103,227,021 words                                       | valid: 217,646 | test: 245,569 |

Words are what whitespace parts, as published, and <eos> for each end of a line. Scored is every word but a part's
first, ends of lines too: perplexity is of these, as in the literature.
"""

import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .download import CHUNK, cache_folder, download, keep
from .stream import SPLITS
from .tokens import TokenStream

URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ZIP_SIZE, ZIP_SHA256 = 190_229_076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
MIRROR = ("Salesforce/wikitext", "wikitext-103-v1")  # of `datasets`: the same lines
WORDS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
TYPES = 267_735
END = "<eos>"


class Wikitext103:
    """The files are fetched on first use, from a mirror if need be, counted, and turned into tokens.

    folder      holds wiki.{train,valid,test}.tokens, or wikitext-103-v1.zip, or will (None: the cache folder)

    A token is a word of the train part, the most frequent first and equally frequent ones by the alphabet, as an
    adaptive softmax wants them; `alphabet` are these words in order. The other parts have no others.

    Raises FileNotFoundError where a file is missing and cannot be fetched, ValueError where one is not the published.
    """

    measure = "ppl"
    answer = "token"

    def __init__(self, folder: str | Path | None = None):
        prepared = cache_folder() / "wikitext103"
        place = Path(folder).expanduser() if folder else prepared
        texts = {split: place / f"wiki.{split}.tokens" for split in SPLITS}
        paths = {split: prepared / f"{split}.int32" for split in SPLITS}
        if not all(path.exists() for path in paths.values()):
            obtain(texts)
        words = keep(prepared / "words.txt", partial(vocabulary, texts["train"])).read_text(encoding="utf-8")
        self.alphabet = words.splitlines()
        self.vocabulary = self.classes = len(self.alphabet)
        number = {word: token for token, word in enumerate(self.alphabet)}
        self.parts = {}
        for split, path in paths.items():
            keep(path, partial(encode, texts[split], number, WORDS[split]))
            self.parts[split] = np.memmap(path, np.int32, mode="r")  # (words,)
        self.data = {split: {"words": len(part)} for split, part in self.parts.items()}

    def stream(self, split: str, batch: int, block: int) -> TokenStream:
        name = f"Wikitext-103's {split} part"
        return TokenStream(self.parts[split], batch, block, endless=split == "train", name=name)


def obtain(texts: dict[str, Path]) -> None:
    """Fetches what is missing of these files."""
    missing = {split: path for split, path in texts.items() if not path.exists()}
    if not missing:
        return
    folder = texts["train"].parent
    try:
        archive = download(URL, folder / "wikitext-103-v1.zip", ZIP_SIZE, ZIP_SHA256)
    except FileNotFoundError as error:
        for split, path in missing.items():
            keep(path, partial(mirrored, split, f"{path} is missing, and {error}"))
        return
    for path in missing.values():
        keep(path, partial(unpack, archive, path.name))


def unpack(archive: Path, name: str) -> Iterator[bytes]:
    with zipfile.ZipFile(archive) as file, file.open(f"wikitext-103/{name}") as member:
        while chunk := member.read(CHUNK):
            yield chunk


def mirrored(split: str, trouble: str) -> Iterator[bytes]:
    """The part's lines out of `datasets`; raises FileNotFoundError with `trouble` where that fails, too."""
    try:
        from datasets import load_dataset

        rows = load_dataset(*MIRROR, split="validation" if split == "valid" else split)
    except Exception:  # its client's errors are of many kinds
        raise FileNotFoundError(trouble) from None
    for row in rows:
        yield (row["text"].rstrip("\n") + "\n").encode()


def lines(path: Path) -> Iterator[list[str]]:
    """The words of each line, with its end."""
    with (
        open(path, encoding="utf-8") as file,
        tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            for line in file:
                yield [*line.split(), END]
                bar.update(len(line))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); delete it and run again") from None


def vocabulary(train: Path) -> Iterator[bytes]:
    """The words, one a line."""
    counts: Counter[str] = Counter()
    for words in lines(train):
        counts.update(words)
    refuse_other(train, "words", counts.total(), WORDS["train"])
    refuse_other(train, "different words", len(counts), TYPES)
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield f"{word}\n".encode()


def encode(path: Path, number: dict[str, int], expected: int) -> Iterator[bytes]:
    """The tokens, int32."""
    total = 0
    for words in lines(path):
        total += len(words)
        try:
            yield np.array([number[word] for word in words], np.int32).tobytes()
        except KeyError as error:
            raise ValueError(f"{path} has {error}, which the train part has not: delete it and run again") from None
    refuse_other(path, "words", total, expected)


def refuse_other(path: Path, what: str, have: int, published: int) -> None:
    if have != published:
        raise ValueError(f"{path} has {have:,} {what}, not the published {published:,}: delete it and run again")
