"""The texts of a file or folder, in chunks: what is read, what is unpacked, and what is skipped and why.

    corpus/                          read in this order              skipped
      a.txt                          corpus/a.txt                    .git (hidden)
      b.zip  (c.txt, d.png)          corpus/b.zip/c.txt              b.zip/d.png (binary)
      e.TXT.GZ                       corpus/e.TXT.GZ                 runs/1 (run folder)

A compressed file is recognized by its content, so that none is taken for text whatever its name is.
"""

import bz2
import codecs
import gzip
import lzma
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from .data_cache import CHUNK, cache_dir, user_path

HEAD = 8192  # bytes that show what a file is
FORMATS = {  # how each format begins
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "lzma": rb"\]\x00\x00..(\xff{8}|.{5}\x00{3})",
    "zstandard": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "zip": rb"PK(\x03\x04|\x05\x06)",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
    "lz4": rb"\x04\x22\x4d\x18",
    "lzip": rb"LZIP\x01",
    "compress": rb"\x1f[\x9d\xa0]",
    "tar": rb".{257}ustar",
}
SUFFIXES = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",
    ".zst": "zstandard",
    ".zip": "zip",
}
SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
RUN_FILES = (".hydra", "metrics.jsonl", "run.log", "multirun.yaml")  # a folder with any of these is a run or a sweep
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # characters that no text has
WIDE_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_texts(path: str | Path, skipped: list[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the name of each text at a path, and its content in chunks; each must be read before the next text.

    A file that is named itself may have any content. In a folder or a zip archive, binary files are skipped.

    Args:
        path: Path of a file or folder.
        skipped: Receives what is left out, with the reason.

    Raises:
        FileNotFoundError: if there is no such path.
        OSError: if it cannot be read.
        ValueError: if it is not a file or folder, cannot be unpacked, or is UTF-16.
    """
    root = user_path(path)
    for file in find_files(path, skipped):
        try:
            stream = open(file, "rb")  # noqa: SIM115 (closed below)
        except OSError as error:
            if file == root:
                raise OSError(f"task.path={path} cannot be read ({error.strerror})") from None
            skip(skipped, root, file, error.strerror)
            continue
        with stream:
            for name, chunks in unpack(file, stream):
                first = next(chunks, b"")
                reason = why_binary(first)
                refuse_wide_characters(name, first)
                if name != root and reason:
                    skip(skipped, root, name, reason)
                else:
                    yield printable(name), chain([first], chunks)


def find_files(path: str | Path, skipped: list[str]) -> list[Path]:
    """The file at a path or, if it is a folder, the files in it, in the order of their paths."""
    root = user_path(path)
    try:
        mode = root.stat().st_mode
        if stat.S_ISDIR(mode):
            os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"task.path={path} does not exist (looked at {root.absolute()})") from None
    except OSError as error:
        raise OSError(f"task.path={path} cannot be read ({error.strerror})") from None
    if stat.S_ISREG(mode):
        return [root]
    if not stat.S_ISDIR(mode):
        what = SPECIAL_FILES.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"task.path={path} is {what}, not a file or folder: write the text to a file")
    if is_run_folder(root):
        raise ValueError(f"task.path={path} is the folder of a run, not of texts")
    files = list(walk(root, skipped))
    if not files:
        skipped_files = f" (skipped {shorten(skipped)})" if skipped else ""
        raise ValueError(f"task.path={path} is a folder without files{skipped_files}")
    return files


def walk(root: Path, skipped: list[str]) -> Iterator[Path]:
    """The files below a folder, in the order of their paths. Links are followed, but nothing is read twice."""
    seen = set()
    stack = [root]
    while stack:
        path = stack.pop()
        try:
            status = path.stat()
            identity = status.st_dev, status.st_ino
            if path != root and path.name.startswith("."):
                skip(skipped, root, path, "hidden")
            elif identity in seen:
                skip(skipped, root, path, "the same as another")
            elif stat.S_ISREG(status.st_mode):
                seen.add(identity)
                yield path
            elif not stat.S_ISDIR(status.st_mode):
                skip(skipped, root, path, SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), "not a file"))
            elif is_run_folder(path):
                skip(skipped, root, path, "run folder")
            elif path.absolute() == cache_dir().absolute():  # it holds copies of texts
                skip(skipped, root, path, "cache folder")
            else:
                seen.add(identity)
                stack += sorted(path.iterdir(), reverse=True)
        except OSError as error:
            skip(skipped, root, path, "broken link" if path.is_symlink() else error.strerror)


def is_run_folder(path: Path) -> bool:
    return any((path / name).exists() for name in RUN_FILES) or path.absolute() == Path.cwd() / "runs"


def unpack(file: Path, stream: BinaryIO) -> Iterator[tuple[Path, Iterator[bytes]]]:
    """Yield the path and the chunks of a file's content or, if it is a zip archive, of each member's."""
    # A size of 0 is taken at its word: some files of /proc have it, and never end.
    head = stream.read(HEAD) if file.stat().st_size else b""
    stream.seek(0)
    kind = format_of(head) or SUFFIXES.get(file.suffix.lower())
    if kind == "zip" and file.suffix.lower() == ".zip":
        yield from unpack_zip(file, stream)
    elif kind == "zip":  # such as a checkpoint or a document
        yield file, iter([head])
    elif kind is None:
        yield file, read_chunks(file, stream) if head else iter([])
    elif not head:
        raise cannot_unpack(file, EOFError("it is empty"))
    else:
        yield file, refuse_packed(file, read_chunks(file, open_compressed(file, stream, kind), kind))


def unpack_zip(file: Path, stream: BinaryIO) -> Iterator[tuple[Path, Iterator[bytes]]]:
    """Yield the members of a zip archive in the order of their names. Nothing is written to the disk."""
    try:
        archive = zipfile.ZipFile(stream)
    except Exception as error:
        raise cannot_unpack(file, error) from None
    for member in sorted(archive.infolist(), key=lambda member: member.filename.split("/")):
        name = file / member.filename.lstrip("/")
        if not member.is_dir() and not member.filename.startswith("__MACOSX/") and not name.name.startswith("."):
            try:
                content = archive.open(member)
            except Exception as error:  # it is encrypted, or damaged
                raise cannot_unpack(name, error) from None
            yield name, refuse_packed(name, read_chunks(name, cast(BinaryIO, content), "zip"))


def open_compressed(file: Path, stream: BinaryIO, kind: str) -> BinaryIO:
    if kind == "zstandard":
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"task.path: {file} is packed by zstandard: pip install zstandard, or unpack it") from None
        return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True))
    openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, "lzma": lzma.open}
    if kind not in openers:
        raise ValueError(f"task.path: {file} is packed as {kind}, which cannot be unpacked here; unpack it by hand")
    return cast(BinaryIO, openers[kind](stream))


def read_chunks(name: Path, stream: BinaryIO, kind: str | None = None) -> Iterator[bytes]:
    """The content of a stream. Raises ValueError where a packed one is damaged, OSError where the disk is."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except MemoryError:
            raise
        except Exception as error:  # each decompressor has errors of its own
            if kind is None:
                raise OSError(f"task.path: {name} cannot be read ({error})") from None
            raise cannot_unpack(name, error) from None
        if not chunk:
            return
        yield chunk


def refuse_packed(name: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Raise ValueError if what has been unpacked is itself compressed, or an archive."""
    first = next(chunks, b"")
    if (kind := format_of(first)) not in (None, "zip"):
        raise ValueError(f"task.path: {name} holds a file packed as {kind}; unpack it by hand")
    yield first
    yield from chunks


def format_of(head: bytes) -> str | None:
    """The format of a compressed file or archive, by its beginning."""
    return next((kind for kind, begin in FORMATS.items() if re.match(begin, head, re.DOTALL)), None)


def why_binary(head: bytes) -> str | None:
    """The reason why something is not text, if it is not: a NUL, or control characters outside of UTF-8."""
    head = head[:HEAD]
    if format_of(head) == "zip":
        return "zip archive of another name"
    if b"\0" in head:
        return "binary"
    try:
        codecs.utf_8_decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return "binary" if CONTROL.search(head) else None
    return None


def refuse_wide_characters(name: Path, head: bytes) -> None:
    """Raise ValueError if a file is text in UTF-16 or UTF-32."""
    for bom, encoding in WIDE_BOMS.items():
        if head.startswith(bom):
            with suppress(UnicodeDecodeError):
                codecs.getincrementaldecoder(encoding)().decode(head)
                raise ValueError(f"task.path: {name} is {encoding.upper()}; convert it to UTF-8 (iconv -t UTF-8)")


def cannot_unpack(name: Path, error: Exception) -> ValueError:
    return ValueError(f"task.path: {name} cannot be unpacked ({error}); unpack it by hand, or replace it")


def skip(skipped: list[str], root: Path, path: Path, reason: str | None) -> None:
    skipped.append(f"{printable(path.relative_to(root) if path != root else path)} ({reason})")


def printable(path: Path) -> str:
    """A path as text that can be printed, also if its name is not UTF-8."""
    return str(path).encode("utf-8", "replace").decode()


def shorten(skipped: list[str], count: int = 10) -> str:
    """The first few of what was skipped."""
    return ", ".join(skipped[:count]) + (f" and {len(skipped) - count:,} more" if len(skipped) > count else "")
