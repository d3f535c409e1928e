"""Files that a task downloads or generates once: checked, resumable downloads, and arrays kept on disk.

They lie in one folder: $EXPIRE_SPAN_CACHE, or the user's cache folder of the system (on Linux $XDG_CACHE_HOME or
~/.cache). A file appears under its name only when it is complete, and only one process at a time makes it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pooch
from filelock import FileLock
from platformdirs import user_cache_path
from requests import RequestException, Response
from tqdm import tqdm

CHUNK = 1 << 20  # bytes
USER_AGENT = "Mozilla/5.0 (expire-span)"  # some servers refuse everything but browsers
TIMEOUT = 30  # seconds without an answer


def cache_dir() -> Path:
    """The folder of all files that are downloaded or generated once: $EXPIRE_SPAN_CACHE, or the user's cache folder."""
    folder = os.environ.get("EXPIRE_SPAN_CACHE")
    return Path(folder).expanduser() if folder else user_cache_path("expire-span")


def download(url: str, path: Path, size: int, sha256: str) -> Path:
    """Download `url` to `path` unless it exists, resuming an interrupted download.

    Args:
        url: Address of the file.
        path: File to download it to.
        size: Size of the file in bytes.
        sha256: Hash of the file in hexadecimal digits, or the beginning of it.

    Raises:
        FileNotFoundError: if the download fails.
        ValueError: if the file is not the published one.
        OSError: if the file cannot be written.
    """
    if path.exists():
        check_file(path, size, sha256)
        return path
    part = path.with_name(path.name + ".part")
    with file_lock(path):
        if not path.exists():
            fetch(url, part, path, size)
            check_file(part, size, sha256)
            part.replace(path)
    return path


def fetch(url: str, part: Path, path: Path, size: int, progress_bar: bool = True) -> None:
    """Append to the file `part` what it still lacks of `url`; `path` is where it is meant to go.

    pooch transfers the data. Its own temporary files are lost on an error, so it writes into ours.
    """
    with open(part, "ab") as file:
        if (start := file.tell()) >= size:
            return

        def start_over_without_ranges(response: Response, **_: object) -> None:
            if response.status_code == 200:  # the server sends the whole file, not the range asked for
                file.truncate(0)

        bar = tqdm(
            desc=path.name, total=size - start, unit="B", unit_scale=True, disable=None if progress_bar else True
        )
        headers = {"User-Agent": USER_AGENT, "Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        request = {"headers": headers, "timeout": TIMEOUT, "hooks": {"response": start_over_without_ranges}}
        try:
            pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK, **request)(url, file, None)
        except RequestException as error:
            progress = f"after {file.tell():,} of {size:,} bytes: {error}"
            raise FileNotFoundError(
                f"cannot download {url} ({progress}); run again, or put it at {path} by hand"
            ) from None
        except OSError as error:
            raise disk_error(path, error) from None


class HubError(Exception):
    """The Hugging Face Hub did not provide the data; there is another source to try."""


def read_hub(*dataset: str, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a dataset on the Hugging Face Hub.

    Raises:
        HubError: if they cannot be loaded.
    """
    try:
        from datasets import load_dataset

        hub_split = "validation" if split == "valid" else split
        yield from load_dataset(*dataset, split=hub_split, **({"streaming": True} if streaming else {}))
    except Exception as error:  # its client raises many kinds of errors
        raise HubError(f"cannot load {dataset[0]} from the Hub ({error})") from error


def check_file(path: Path, size: int, sha256: str) -> None:
    """Raise ValueError unless the file has this size (bytes) and this sha256 (hexadecimal, or its beginning)."""
    have = path.stat().st_size
    if have != size:
        raise ValueError(f"{path} has {have:,} bytes, not {size:,}: delete it and run again")
    digest = pooch.file_hash(str(path), "sha256")
    if not digest.startswith(sha256):
        raise ValueError(f"{path} has sha256 {digest}, not {sha256}: delete it and run again")


def cached_file(path: Path, chunks: Callable[[], Iterable[bytes]]) -> Path:
    """Write what `chunks` yields to `path` unless it exists. If that fails, no file is left."""
    if not path.exists():
        with file_lock(path):
            if path.exists():
                return path
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                with open(part, "wb", buffering=0) as file:
                    for chunk in chunks():
                        write(file, chunk, path)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    return path


def cached_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array NAME.npy of the cache folder, memory-mapped; `pieces` yields it along its first dimension."""

    def chunks() -> Iterator[bytes]:
        header = BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        yield header.getvalue()
        for piece in pieces():
            yield piece.tobytes()

    return np.load(cached_file(cache_dir() / f"{name}.npy", chunks), mmap_mode="r")


def write(file: BinaryIO, chunk: bytes, path: Path) -> None:
    """Write all of `chunk` to an unbuffered file. (A memory map would kill the process when the disk is full.)"""
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise disk_error(path, error) from None


def disk_error(path: Path, error: OSError) -> OSError:
    advice = "make room, or set EXPIRE_SPAN_CACHE to another folder"
    return OSError(f"cannot write {path} ({error.strerror}); {advice}")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Keep other processes, such as those of a sweep, from making the same file at the same time."""
    lock = FileLock(path.with_name(path.name + ".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        advice = "set EXPIRE_SPAN_CACHE to a folder of your own"
        raise OSError(f"cannot write to {path.parent} ({error.strerror}); {advice}") from None
    try:
        yield
    finally:
        lock.release()
