"""Files that a task downloads or generates once: checked, resumable downloads, and arrays kept on disk.

They lie in one folder: $EXPIRE_SPAN_CACHE, or the user's cache folder of the system (on Linux $XDG_CACHE_HOME or
~/.cache). A file appears under its name only when it is complete, and only one process at a time makes it.
"""

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pooch
from filelock import FileLock
from requests import HTTPError, RequestException, Response, Timeout
from tqdm import tqdm

from expire_span.cache_folder import cache_dir

CHUNK = 1 << 20  # bytes
USER_AGENT = "Mozilla/5.0 (expire-span)"  # some servers refuse everything but browsers
TIMEOUT = 30  # seconds without an answer


def user_path(path: str | Path) -> Path:
    """A path that may begin with ~; if there is no such home, the ~ stays."""
    return Path(os.path.expanduser(path))


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
            fetch(url, part, path, size, sha256)
            part.replace(path)
    return path


def fetch(url: str, part: Path, path: Path, size: int, sha256: str, progress_bar: bool = True) -> None:
    """Complete the file `part` and check it; `path` is where it is meant to go.

    What turns out not to be the published file is removed, so that the next try does not append to it.
    """
    transfer(url, part, path, size, progress_bar)
    try:
        check_file(part, size, sha256)
    except ValueError:
        with open(part, "rb") as file:
            is_html = file.read(1024).lstrip().lower().startswith((b"<!doctype html", b"<html"))
        what = "an HTML page" if is_html else "another file"
        got = f"{what} of {part.stat().st_size:,} bytes, not the published one of {size:,}, and it was removed"
        part.unlink()
        raise ValueError(f"{url} sent {got}; run again, or put the file at {path} by hand") from None


def transfer(url: str, part: Path, path: Path, size: int, progress_bar: bool) -> None:
    """Append to the file `part` what it still lacks of `url`.

    pooch transfers the data. Its own temporary files are lost on an error, so it writes into ours.
    """
    with open(part, "ab") as file:
        if (start := file.tell()) >= size:
            return

        def check_response(response: Response, **_: object) -> None:
            if response.status_code not in (200, 206):
                return
            if response.headers.get("Content-Type", "").startswith("text/html"):  # of a login, or an error
                raise RequestException("the server sends an HTML page, not the file")
            if response.status_code == 200:  # the whole file, not the range asked for
                file.truncate(0)

        bar = tqdm(
            desc=path.name, total=size - start, unit="B", unit_scale=True, disable=None if progress_bar else True
        )
        headers = {"User-Agent": USER_AGENT, "Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        request = {"headers": headers, "timeout": TIMEOUT, "hooks": {"response": check_response}}
        try:
            pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK, **request)(url, file, None)
        except RequestException as error:
            if error.response is not None and error.response.status_code == 416:  # the range begins after its end
                file.truncate(0)
            progress = f"after {file.tell():,} of {size:,} bytes: {reason(error)}"
            raise FileNotFoundError(
                f"cannot download {url} ({progress}); run again, or put it at {path} by hand"
            ) from None
        except OSError as error:
            raise disk_error(path, error) from None


def reason(error: RequestException) -> str:
    """Why a request failed, in a few words: the HTTP library nests its errors in each other."""
    if isinstance(error, Timeout):
        return f"no answer in {TIMEOUT} seconds"
    if isinstance(error, HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}, {error.response.reason}"
    cause: BaseException = error
    while deeper := cause.__cause__ or cause.__context__:
        cause = deeper
    return getattr(cause, "strerror", None) or str(cause)


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
    check_size(path, size)
    digest = pooch.file_hash(str(path), "sha256")
    if not digest.startswith(sha256):
        raise ValueError(f"{path} has sha256 {digest}, not {sha256}: delete it and run again")


def check_size(path: Path, size: int) -> None:
    """Raise ValueError unless there is a file of this size (bytes), OSError if it is not a file."""
    check_is_file(path, str(path))
    have = path.stat().st_size
    if have != size:
        raise ValueError(f"{path} has {have:,} bytes, not {size:,}: delete it and run again")


def check_is_file(path: Path, name: str) -> None:
    """Raise an OSError that begins with `name` unless there is a file: reading a named pipe would never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist (looked at {path.absolute()})") from None
    except OSError as error:
        raise OSError(f"{name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise OSError(f"{name} is not a file" + (" but a folder" if stat.S_ISDIR(mode) else ""))


def read_json(path: Path, name: str) -> Any:
    """What a JSON file holds. Raises OSError or ValueError, which begin with `name`, if it cannot be read."""
    check_is_file(path, name)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from None


def map_tokens(path: Path, dtype: type[np.unsignedinteger | np.signedinteger], length: int) -> np.ndarray:
    """The tokens in a file, (length,), memory-mapped. Raises ValueError if it has another length."""
    check_size(path, length * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, mode="r")


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


def unpack(archive: Path, name: str) -> Iterator[bytes]:
    """The content of a member of a zip archive, in chunks."""
    with zipfile.ZipFile(archive) as file, file.open(name) as member:
        while chunk := member.read(CHUNK):
            yield chunk


def cached_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype, pieces: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array NAME.npy of the cache folder, memory-mapped; `pieces` yields it along its first dimension.

    Raises:
        ValueError: if the file holds anything else.
    """

    def chunks() -> Iterator[bytes]:
        header = BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        yield header.getvalue()
        for piece in pieces():
            yield piece.tobytes()

    path = cached_file(cache_dir() / f"{name}.npy", chunks)
    check_is_file(path, str(path))
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # it refuses pickled objects
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged header raises many kinds
        raise ValueError(f"{path} is damaged ({error}): delete it and run again") from None
    if (array.shape, array.dtype) != (shape, dtype):
        what = f"{array.dtype} of shape {array.shape}, not {dtype} of {shape}"
        raise ValueError(f"{path} holds {what}: delete it and run again")
    return array


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
