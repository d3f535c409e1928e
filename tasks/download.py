"""Files that a task fetches or makes once: a resumable, checked download, and arrays kept on disk.

All lie in one folder: $EXPIRE_SPAN_CACHE, else $XDG_CACHE_HOME/expire-span, else ~/.cache/expire-span. A file appears
there under its name only when it is whole, and one process at a time makes it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from io import BytesIO, FileIO
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

CHUNK = 1 << 20  # bytes


def cache_folder() -> Path:
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EXPIRE_SPAN_CACHE") or Path(parent) / "expire-span").expanduser()


def download(url: str, path: Path, size: int, sha256: str) -> Path:
    """Fetches `url` to `path` unless it is there, going on where an interrupted download stopped.

    Raises FileNotFoundError where it cannot be fetched, ValueError where `size` (bytes) or `sha256` (hexadecimal) is
    not that of the file, OSError where it cannot be written.
    """
    if path.exists():
        check(path, size, sha256)
        return path
    part = path.with_name(path.name + ".part")
    with alone(path):
        if not path.exists():
            fetch(url, part, path, size)
            check(part, size, sha256)
            part.replace(path)
    return path


def fetch(url: str, part: Path, path: Path, size: int, silent: bool = False) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have >= size:
        return
    # Some servers turn away whoever is not a browser.
    request = Request(url, headers={"User-Agent": "Mozilla/5.0 (expire-span)", "Range": f"bytes={have}-"})
    try:
        with urlopen(request, timeout=30) as answer:
            have = have if answer.status == 206 else 0  # a server may send the whole file all the same
            with (
                FileIO(part, "a" if have else "w") as file,
                tqdm(
                    desc=path.name, initial=have, total=size, unit="B", unit_scale=True, disable=silent or None
                ) as bar,
            ):
                while chunk := answer.read(CHUNK):
                    write(file, chunk, part)
                    bar.update(len(chunk))
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise FileNotFoundError(f"cannot fetch {url} ({error}); run again, or put it at {path} by hand") from None
    have = part.stat().st_size
    if have < size:
        raise ValueError(f"{url} broke off after {have:,} of {size:,} bytes; run again to go on from there")


def check(path: Path, size: int, sha256: str) -> None:
    """Raises ValueError unless the file has this size (bytes) and this sha256 (hexadecimal, or its beginning)."""
    have = path.stat().st_size
    if have != size:
        raise ValueError(f"{path} has {have:,} bytes, not {size:,}: delete it and run again")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(f"{path} has sha256 {digest}, not {sha256}: delete it and run again")


def keep(path: Path, make: Callable[[], Iterable[bytes]]) -> Path:
    """Writes what `make` yields to `path`, unless it is there; nothing is left where that fails."""
    if not path.exists():
        with alone(path):
            if path.exists():
                return path
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                with FileIO(part, "w") as file:
                    for chunk in make():
                        write(file, chunk, path)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    return path


def keep_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array NAME.npy of the cache folder, memory-mapped; `make` yields it in pieces along its first dimension."""

    def pieces() -> Iterator[bytes]:
        header = BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        yield header.getvalue()
        for piece in make():
            yield piece.tobytes()

    return np.load(keep(cache_folder() / f"{name}.npy", pieces), mmap_mode="r")


def write(file: FileIO, chunk: bytes, path: Path) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        advice = "make room, or set EXPIRE_SPAN_CACHE to another folder"
        raise OSError(f"cannot write {path} ({error.strerror}); {advice}") from None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keeps out other processes about to make the same file, as ranks and sweeps are, where the disk knows locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(path.name + ".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        advice = "set EXPIRE_SPAN_CACHE to a folder of your own"
        raise OSError(f"cannot write to {path.parent} ({error.strerror}); {advice}") from None
    with lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
