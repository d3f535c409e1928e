"""Enwik8: predict the next byte of the first 100 million bytes of Wikipedia's dump of 2006.

    | train: 90 million                                              | valid: 5 | test: 5 |

Scored is every byte but a part's first, in bits per byte.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .download import CHUNK, cache_folder, check, download, keep
from .stream import SPLITS
from .tokens import TokenStream

URL = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_SIZE, ZIP_SHA256 = 36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SIZE, SHA256 = 100_000_000, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


class Enwik8:
    """The file is fetched on first use, and checked on every use.

    folder      holds enwik8, or enwik8.zip, or will (None: the cache folder, see download.py)

    Raises what `download` raises.
    """

    vocabulary = classes = 256
    measure = "bpb"
    answer = "token"

    def __init__(self, folder: str | Path | None = None):
        place = Path(folder).expanduser() if folder else cache_folder()
        self.path = place / "enwik8"
        if not self.path.exists():
            archive = download(URL, place / "enwik8.zip", ZIP_SIZE, ZIP_SHA256)
            keep(self.path, lambda: unpack(archive))
        check(self.path, SIZE, SHA256)
        whole = np.memmap(self.path, np.uint8, mode="r")
        self.parts = dict(zip(SPLITS, np.split(whole, [SIZE // 100 * 90, SIZE // 100 * 95]), strict=True))

    def bytes_per_token(self, split: str) -> float:
        return 1.0

    def stream(self, split: str, batch: int, block: int) -> TokenStream:
        return TokenStream(self.parts[split], batch, block, endless=split == "train", name=f"enwik8's {split} part")


def unpack(archive: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(archive) as file, file.open("enwik8") as member:
        while chunk := member.read(CHUNK):
            yield chunk
