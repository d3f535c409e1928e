"""Wikitext-103 (section A.1.1, table 5): predict the next word of good and featured articles of Wikipedia.

    | train: 103,227,021 words                                       | valid: 217,646 | test: 245,569 |

Words are separated by whitespace, as published, and <eos> ends each line. Every word of a split but the first is
scored, the ends of lines too: perplexity is of these, as in the literature.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .base import SPLITS, Task
from .data_cache import (
    HubError,
    cache_dir,
    cached_file,
    check_is_file,
    download,
    map_tokens,
    read_hub,
    unpack,
    user_path,
)
from .token_stream import TokenStream

HUB_DATASET = ("Salesforce/wikitext", "wikitext-103-v1")
URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ZIP_SIZE, ZIP_SHA256 = 190_229_076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
NUM_WORDS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
VOCAB_SIZE = 267_735
END_OF_LINE = "<eos>"


class Wikitext103(Task):
    """The text is downloaded on first use, checked by its word counts, and turned into tokens in the cache folder.

    It comes from the Hugging Face Hub or, if that fails, from the published archive. The tokens are the words of the
    train split, the most frequent first and equally frequent ones in alphabetical order, as adaptive softmax wants
    them. The other splits have no other words.

    Args:
        data_dir: Folder that has wiki.{train,valid,test}.tokens or wikitext-103-v1.zip, or will have them (None: in the
            cache folder). Files that exist are not downloaded again.

    Attributes:
        splits: the tokens of each split, (N,) int32.

    Raises:
        FileNotFoundError: if a file is missing and cannot be downloaded.
        ValueError: if a file is not the published one.
    """

    metric = "ppl"
    scoring = "token"

    def __init__(self, data_dir: str | Path | None = None):
        prepared = cache_dir() / "wikitext103"
        folder = user_path(data_dir) if data_dir else prepared
        texts = {split: folder / f"wiki.{split}.tokens" for split in SPLITS}
        token_files = {split: prepared / f"{split}.int32" for split in SPLITS}
        if not all(path.exists() for path in token_files.values()):
            provide_texts(texts)
        vocab_file = cached_file(prepared / "words.txt", partial(build_vocab, texts["train"]))
        self.vocab = read_vocab(vocab_file)
        self.vocab_size = self.num_classes = len(self.vocab)
        token_of = {word: token for token, word in enumerate(self.vocab)}
        self.splits = {}
        for split, path in token_files.items():
            cached_file(path, partial(encode, texts[split], token_of, NUM_WORDS[split]))
            self.splits[split] = map_tokens(path, np.int32, NUM_WORDS[split])
        self.data_info = {split: {"words": len(tokens)} for split, tokens in self.splits.items()}

    def stream(self, split: str, batch_size: int, block_size: int) -> TokenStream:
        name = f"Wikitext-103's {split} split"
        return TokenStream(self.splits[split], batch_size, block_size, endless=split == "train", name=name)


def read_vocab(path: Path) -> list[str]:
    """The words in a file, one per line. Raises ValueError if they are not as many as published."""
    check_is_file(path, str(path))
    try:
        words = path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); delete it and run again") from None
    check_count(path, "words", len(words), VOCAB_SIZE)
    return words


def provide_texts(texts: dict[str, Path]) -> None:
    """Write those of these files that do not exist: from an archive beside them, the Hub, or the published archive."""
    archive = texts["train"].parent / "wikitext-103-v1.zip"
    if not archive.exists():
        with suppress(HubError):
            for split, path in texts.items():
                cached_file(path, partial(hub_text, split))
    for path in texts.values():
        if not path.exists():
            try:
                download(URL, archive, ZIP_SIZE, ZIP_SHA256)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path} is missing, and {error}") from None
            cached_file(path, partial(unpack, archive, f"wikitext-103/{path.name}"))


def hub_text(split: str) -> Iterator[bytes]:
    """The lines of a split on the Hub.

    Raises:
        HubError: if they cannot be loaded or do not have the published number of words.
    """
    num_words = 0
    for row in read_hub(*HUB_DATASET, split=split):
        line = row["text"].rstrip("\n")
        num_words += len(line.split()) + 1
        yield f"{line}\n".encode()
    if num_words != NUM_WORDS[split]:
        raise HubError(f"{HUB_DATASET[0]} has {num_words:,} words in {split}, not the published {NUM_WORDS[split]:,}")


def read_lines(path: Path) -> Iterator[list[str]]:
    """The words of each line, and its end."""
    check_is_file(path, str(path))
    with (
        open(path, encoding="utf-8") as file,
        tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            for line in file:
                yield [*line.split(), END_OF_LINE]
                bar.update(len(line))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error}); delete it and run again") from None


def build_vocab(train: Path) -> Iterator[bytes]:
    """The words of the train split, one per line, the most frequent first."""
    counts: Counter[str] = Counter()
    for words in read_lines(train):
        counts.update(words)
    check_count(train, "words", counts.total(), NUM_WORDS["train"])
    check_count(train, "different words", len(counts), VOCAB_SIZE)
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        yield f"{word}\n".encode()


def encode(path: Path, token_of: dict[str, int], expected: int) -> Iterator[bytes]:
    """The tokens of a file, int32."""
    num_words = 0
    for words in read_lines(path):
        num_words += len(words)
        try:
            yield np.array([token_of[word] for word in words], np.int32).tobytes()
        except KeyError as error:
            raise ValueError(f"{path} has {error}, which is not in the train split: delete it and run again") from None
    check_count(path, "words", num_words, expected)


def check_count(path: Path, what: str, count: int, published: int) -> None:
    if count != published:
        raise ValueError(f"{path} has {count:,} {what}, not the published {published:,}: delete it and run again")
