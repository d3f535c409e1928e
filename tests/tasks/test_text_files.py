"""Which files are read as text, how they are unpacked, and what is skipped or refused."""

import bz2
import codecs
import gzip
import hashlib
import io
import logging
import lzma
import multiprocessing
import os
import tarfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest

from expire_span.tasks import text as text_module
from expire_span.tasks.data_cache import CHUNK
from expire_span.tasks.text import Text

CONTENT = "Grüße, and a plain tail of letters. " * 30
PICTURE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zstandard_compressed(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def text_of(task):
    content = b"".join(task.splits[split].tobytes() for split in ("train", "valid", "test"))
    return content.decode()


def skipped(task):
    return task.data_info["files"]["skipped"]


@pytest.mark.parametrize("name", ["a.gz", "a.XZ", "a.lzma", "a.Bz2", "a.ZST", "a.zip", "a.txt", "a"])
@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
        zstandard_compressed,
    ],
    ids=["gzip", "bzip2", "xz", "lzma", "zstandard"],
)
def test_a_compressed_file_is_unpacked_whatever_its_name_is(tmp_path, pack, name):
    (tmp_path / name).write_bytes(pack(CONTENT.encode()))
    assert text_of(Text(tmp_path / name)) == CONTENT
    assert text_of(Text(tmp_path)) == CONTENT


def test_a_zip_archive_is_its_members_in_order_and_nothing_is_written(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    members = {"b/c.txt": "third ", "b.txt": "second ", "../a.txt": "first ", "picture.png": PICTURE, ".hidden": "x"}
    (folder / "texts.ZIP").write_bytes(zipped(members))
    before = sorted(tmp_path.rglob("*"))
    task = Text(folder)
    assert text_of(task) == "first third second "
    assert skipped(task) == "texts.ZIP/picture.png (binary)"
    assert task.data_info["files"]["number"] == 3
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + PICTURE, "is packed as 7z, which cannot be unpacked here"),
        ("a.rar", b"Rar!\x1a\x07" + PICTURE, "is packed as rar"),
        ("a.lz4", b"\x04\x22\x4d\x18" + PICTURE, "is packed as lz4"),
        ("a.Z", b"\x1f\x9d" + PICTURE, "is packed as compress"),
        ("a.tar", tarred(CONTENT.encode()), "is packed as tar"),
        ("a.tgz", gzip.compress(tarred(CONTENT.encode())), "holds a file packed as tar"),
        ("a.gz.gz", gzip.compress(gzip.compress(CONTENT.encode())), "holds a file packed as gzip"),
        ("a.zip", zipped({"b.gz": gzip.compress(CONTENT.encode())}), "b.gz holds a file packed as gzip"),
        ("a.zip", zipped({"b.txt": CONTENT})[:100], "cannot be unpacked"),
        ("a.bz2", bz2.compress(CONTENT.encode())[:-9], "cannot be unpacked"),
        ("a.lzma", b"no archive", "cannot be unpacked"),
        ("a.GZ", b"", "cannot be unpacked"),
    ],
    ids=[
        "7z",
        "rar",
        "lz4",
        "compress",
        "tar",
        "tgz",
        "gz_twice",
        "gz_in_zip",
        "damaged_zip",
        "damaged_bz2",
        "not_lzma",
        "empty",
    ],
)
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_what_cannot_be_unpacked_is_refused_by_name(tmp_path, name, content, message, in_folder):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "other.txt").write_text(CONTENT, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"\Atask\.path: .*{name}.*{message}"):
        Text(tmp_path if in_folder else tmp_path / name)


def test_without_zstandard_its_files_are_refused_with_advice(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd" + PICTURE)
    with pytest.raises(ValueError, match=r"a.zst is packed by zstandard: pip install zstandard, or unpack it"):
        Text(tmp_path / "a.zst")


def test_a_folder_is_read_without_binary_files_runs_and_hidden_files_and_the_rest_is_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text(CONTENT, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(PICTURE)
    (tmp_path / "noise").write_bytes(b"\xff\x01" * 100)
    (tmp_path / "document.docx").write_bytes(zipped({"document.xml": "<p>text</p>"}))
    (tmp_path / ".secret").write_text("secret")
    for number, name in enumerate(("metrics.jsonl", "run.log", "multirun.yaml")):
        (tmp_path / "my" / str(number)).mkdir(parents=True)
        (tmp_path / "my" / str(number) / name).write_text("a run")
        (tmp_path / "my" / str(number) / "vocab.json").write_text("a run")
    (tmp_path / "my" / "3" / ".hydra").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "gone").symlink_to("nowhere")
    caplog.set_level(logging.INFO)
    task = Text(tmp_path)
    assert text_of(task) == CONTENT
    reasons = [
        ".secret (hidden)", "gone (broken link)", "my/0 (run folder)", "my/1 (run folder)", "my/2 (run folder)",
        "my/3 (run folder)", "pipe (a named pipe)", "zero (a device)",
        "document.docx (zip archive of another name)", "noise (binary)", "picture.png (binary)",
    ]  # fmt: skip
    assert skipped(task) == ", ".join(reasons[:10]) + " and 1 more"
    assert f"text: 1 files, {len(CONTENT.encode()):,} bytes; skipped 11: {skipped(task)}" in caplog.text


def test_the_runs_of_the_current_folder_are_not_its_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "report.md").write_text("report")
    assert text_of(Text(".")) == "text"
    (tmp_path / ".hydra").mkdir()
    with pytest.raises(ValueError, match=r"task\.path=\. is the folder of a run, not of texts"):
        Text(".")


def test_links_are_followed_and_nothing_is_read_twice(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "far.txt").write_text("far ")
    (folder / "a.txt").write_text("near ")
    (folder / "b").symlink_to(elsewhere)
    (folder / "c").symlink_to(elsewhere)
    (folder / "d.txt").symlink_to("a.txt")
    (folder / "e").symlink_to(folder)
    (folder / "f").symlink_to("f")
    task = Text(folder)
    assert text_of(task) == "near far "
    again = ", ".join(f"{name} (the same as another)" for name in ("c", "d.txt", "e"))
    assert skipped(task) == f"{again}, f (broken link)"


@contextmanager
def as_nobody():
    """Without the rights of root, if the tests have them."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_may_not_be_read_is_said_in_a_folder_and_refused_otherwise(monkeypatch):
    with TemporaryDirectory() as name, TemporaryDirectory() as cache:
        monkeypatch.setenv("EXPIRE_SPAN_CACHE", cache)
        folder = Path(name)
        folder.chmod(0o755)
        Path(cache).chmod(0o777)
        (folder / "a.txt").write_text("text")
        (folder / "b.txt").write_text("secret")
        (folder / "c").mkdir()
        (folder / "b.txt").chmod(0)
        (folder / "c").chmod(0)
        with as_nobody():
            assert skipped(Text(folder)) == "c (Permission denied), b.txt (Permission denied)"
            for path in ("b.txt", "c"):
                with pytest.raises(OSError, match=rf"\Atask\.path=.*{path} cannot be read \(Permission denied\)\Z"):
                    Text(folder / path)


def test_what_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"task\.path=.*pipe is a named pipe, not a file or folder"):
        Text(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"task\.path=/dev/zero is a device, not a file or folder"):
        Text("/dev/zero")
    for path in ("/proc/kmsg", "/proc/self/status"):  # their size is said to be 0
        if os.access(path, os.R_OK):
            with pytest.raises(ValueError, match=rf"task\.path={path} is empty"):
                Text(path)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_byte_order_mark_is_not_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"first \xef\xbb\xbf")
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8 + b"second")
    plain = tmp_path / "plain.dat"
    whole = Text(tmp_path, tokenizer=tokenizer).data_info["sha256"]
    plain.write_bytes(b"first \xef\xbb\xbfsecond")
    assert whole == Text(plain, tokenizer=tokenizer).data_info["sha256"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_text_of_wide_characters_is_refused_by_name(tmp_path, encoding):
    path = tmp_path / "wide.txt"
    path.write_bytes(("\ufeff" * encoding.endswith("be") + CONTENT * 300).encode(encoding))
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=r"task\.path: .*wide.txt is UTF-(16|32); convert it to UTF-8"):
            Text(source)


def test_a_file_with_any_content_can_be_named_itself(tmp_path):
    (tmp_path / "picture.png").write_bytes(PICTURE)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert b"".join(part.tobytes() for part in Text(tmp_path / "picture.png").splits.values()) == PICTURE
    assert len(Text(tmp_path).splits["train"]) == 4  # without control characters it may be text of another encoding
    with pytest.raises(ValueError, match=r"byte 3 of .*latin.txt is not UTF-8; convert it"):
        Text(tmp_path, tokenizer="char")


def test_a_character_may_lie_in_two_chunks(tmp_path):
    content = "日本é😀" * (CHUNK // 8)
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    task = Text(tmp_path / "a.txt", tokenizer="char")
    assert hashlib.sha256(content.encode("utf-32-le")).hexdigest() == task.data_info["sha256"]
    tokens = np.concatenate([task.splits[split] for split in ("train", "valid", "test")])
    assert "".join(task.vocab[token] for token in tokens) == content
    assert task.bytes_per_token("train") == pytest.approx(3, abs=1e-5)
    (tmp_path / "b.txt").write_bytes(content.encode() + b"\xe9")
    with pytest.raises(ValueError, match=rf"byte {len(content.encode()):,} of .*b.txt is not UTF-8"):
        Text(tmp_path / "b.txt", tokenizer="char")


def test_a_small_file_that_unpacks_to_more_than_the_disk_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=8_000_000))
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(CHUNK)) * 3000)  # 3 GB of zeros
    with pytest.raises(ValueError, match=r"task\.path=.*a.gz has more than 4,000,000 bytes, half of what is free in"):
        Text(tmp_path / "a.gz")
    assert not list(Path(os.environ["EXPIRE_SPAN_CACHE"]).glob("text-*/*.part"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc")
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_neither_preparing_nor_reading_takes_memory_in_proportion_to_the_text(tmp_path, tokenizer):
    """The tables of all characters take some 40 MB, whatever the text."""
    size = 64_000_000
    (tmp_path / "a.txt").write_text("a b c d " * (size // 8))
    for limit in (60_000_000, 8_000_000):  # once to write the tokens, once to map them
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("RssAnon")
        task = Text(tmp_path / "a.txt", tokenizer=tokenizer)
        assert len(task.splits["train"]) == size * 0.9
        next(task.stream("train", 64, 512))
        assert resident("RssAnon") - before < limit
        assert resident("VmHWM") - resident("RssFile") - before < limit  # also at its peak


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def prepare(path, results):
    with suppress(ValueError):
        results.put(Text(path).data_info["sha256"])


def test_several_processes_prepare_a_text_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(CONTENT * 1000, encoding="utf-8")
    counts = tmp_path / "read"
    read = text_module.read_texts

    def counted(path, skipped):
        with open(counts, "a") as file:
            file.write("read\n")
        yield from read(path, skipped)

    monkeypatch.setattr(text_module, "read_texts", counted)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=prepare, args=(tmp_path / "a.txt", results)) for _ in range(4)]
    for process in processes:
        process.start()
    hashes = {results.get() for _ in processes}
    for process in processes:
        process.join(60)
    assert len(hashes) == 1
    assert counts.read_text() == "read\n"


def test_a_text_that_has_changed_is_read_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(CONTENT, encoding="utf-8")
    first = Text(path).data_info
    path.write_text(CONTENT.replace("a plain", "another"), encoding="utf-8")
    os.utime(path, ns=(0, 0))
    second = Text(path).data_info
    assert first["sha256"] != second["sha256"]
    monkeypatch.setattr(text_module, "read_texts", None)
    assert Text(path).data_info == second


def test_the_cache_folder_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "texts" / "cache"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(CONTENT, encoding="utf-8")
    first = Text(tmp_path / "texts")
    assert text_of(first) == text_of(Text(tmp_path / "texts")) == CONTENT
    assert skipped(Text(tmp_path / "texts", tokenizer="char")) == "cache (cache folder)"


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"not JSON", b'{"length": -1}'])
def test_a_damaged_note_of_what_a_text_holds_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.txt").write_text(CONTENT, encoding="utf-8")
    (Text(tmp_path / "a.txt").prepared / "content.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"content\.json .*(delete it and run again|is not JSON)"):
        Text(tmp_path / "a.txt")


def test_damaged_or_missing_tokens_are_refused_by_their_folder(tmp_path):
    (tmp_path / "a.txt").write_text(CONTENT, encoding="utf-8")
    prepared = Text(tmp_path / "a.txt").prepared
    for damage in (lambda path: path.write_bytes(b"short"), lambda path: path.unlink()):
        damage(prepared / "tokens")
        with pytest.raises(ValueError, match=rf"{prepared} is damaged: delete it and run again"):
            Text(tmp_path / "a.txt")


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_text_whose_preparation_was_interrupted_is_prepared_anew(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text(CONTENT, encoding="utf-8")
    expected = hashlib.sha256(CONTENT.encode("utf-8" if tokenizer == "byte" else "utf-32-le")).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(text_module.json, "dumps", raise_interrupt)  # the tokens are written, and not yet what they are
        with pytest.raises(KeyboardInterrupt):
            Text(tmp_path / "a.txt", tokenizer=tokenizer)
    assert Text(tmp_path / "a.txt", tokenizer=tokenizer).data_info["sha256"] == expected


def raise_interrupt(*_):
    raise KeyboardInterrupt
