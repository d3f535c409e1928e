"""Enwik8 (section 5.3, tables 2 and 4): predict the next of the first 100 million bytes of Wikipedia's dump of 2006.

    | train: 90 million                                              | valid: 5 | test: 5 |

Every byte of a split but the first is scored, in bits per byte.
"""

from pathlib import Path

import numpy as np

from .base import SPLITS, Task
from .data_cache import cache_dir, cached_file, check_file, download, unpack, user_path
from .token_stream import TokenStream

URL = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_SIZE, ZIP_SHA256 = 36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SIZE, SHA256 = 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


class Enwik8(Task):
    """The file is downloaded on first use and checked on every use.

    Args:
        data_dir: Folder that has enwik8 or enwik8.zip, or will have them (None: the cache folder).

    Attributes:
        splits: the bytes of each split, (N,) uint8.

    Raises:
        FileNotFoundError: if the file cannot be downloaded.
        ValueError: if it is not the published one.
    """

    vocab_size = num_classes = 256
    metric = "bpb"
    scoring = "token"

    def __init__(self, data_dir: str | Path | None = None):
        folder = user_path(data_dir) if data_dir else cache_dir()
        path = folder / "enwik8"
        if not path.exists():
            archive = download(URL, folder / "enwik8.zip", ZIP_SIZE, ZIP_SHA256)
            cached_file(path, lambda: unpack(archive, "enwik8"))
        check_file(path, SIZE, SHA256)
        content = np.memmap(path, np.uint8, mode="r")
        self.splits = dict(zip(SPLITS, np.split(content, [SIZE // 100 * 90, SIZE // 100 * 95]), strict=True))

    def stream(self, split: str, batch_size: int, block_size: int) -> TokenStream:
        name = f"enwik8's {split} split"
        return TokenStream(self.splits[split], batch_size, block_size, endless=split == "train", name=name)
