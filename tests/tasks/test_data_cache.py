import errno
import hashlib
import multiprocessing
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from file_server import serve

from expire_span.tasks import data_cache
from expire_span.tasks.data_cache import cache_dir, cached_array, cached_file, download

CONTENT = np.random.default_rng(0).integers(256, size=3_000_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with serve({"/content": CONTENT}) as server:
        yield server


def fetch(server, folder: Path, sha256=SHA256):
    return download(f"{server.url}/content", folder / "content", len(CONTENT), sha256)


def visible(folder: Path):
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


def test_a_file_is_downloaded_once(server, tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert fetch(server, folder).read_bytes() == CONTENT
    assert server.requests == [("/content", 0)]
    assert visible(folder) == ["content"]


def test_an_interrupted_download_resumes_where_it_stopped(server, tmp_path):
    server.breaks_off = 1_200_000
    with pytest.raises(FileNotFoundError, match=r"\(after 1,048,576 of 3,000,000 bytes: .*; run again"):
        fetch(server, tmp_path)
    assert visible(tmp_path) == ["content.part"]
    server.breaks_off = None
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [start for _, start in server.requests] == [0, 1_048_576]


def test_a_server_without_ranges_sends_the_whole_file_again(server, tmp_path):
    (tmp_path / "content.part").write_bytes(b"wrong" * 100)
    server.ranges = False
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_not_put_in_place(server, tmp_path):
    with pytest.raises(ValueError, match=r"/content sent another file of 3,000,000 bytes, .*, and it was removed; run"):
        fetch(server, tmp_path, sha256="0" * 64)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("content_type", [None, "text/html; charset=utf-8"])
def test_an_html_page_is_refused_and_not_kept(server, tmp_path, content_type):
    server.files["/content"], server.content_type = b"\n<!DOCTYPE html><title>Log in</title>", content_type
    told = "the server sends an HTML page" if content_type else "sent an HTML page of 37 bytes, not the published one"
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        fetch(server, tmp_path)
    server.files["/content"], server.content_type = CONTENT, None
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_an_html_page_does_not_spoil_what_has_been_downloaded_before(server, tmp_path):
    server.breaks_off = 1_200_000
    with pytest.raises(FileNotFoundError):
        fetch(server, tmp_path)
    server.breaks_off, server.content_type = None, "text/html"
    with pytest.raises(FileNotFoundError, match="the server sends an HTML page"):
        fetch(server, tmp_path)
    server.content_type = None
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("/content", 1_048_576)


def test_a_wrong_beginning_is_not_kept_for_a_third_try(server, tmp_path):
    (tmp_path / "content.part").write_bytes(b"<html>" * 100)
    with pytest.raises(ValueError, match=r"sent an HTML page of 3,000,000 bytes"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_the_beginning_of_a_checksum_suffices(server, tmp_path):
    assert fetch(server, tmp_path, sha256=SHA256[:8]).read_bytes() == CONTENT


def test_a_file_that_is_already_there_is_checked(server, tmp_path):
    (tmp_path / "content").write_bytes(CONTENT[:10])
    with pytest.raises(ValueError, match=r"content has 10 bytes, not 3,000,000: delete it"):
        fetch(server, tmp_path)
    assert server.requests == []


def test_a_missing_page_is_reported_in_one_line(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\Acannot download .*/elsewhere \(.*404[^\n]*by hand\Z"):
        download(f"{server.url}/elsewhere", tmp_path / "content", len(CONTENT), SHA256)


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path):
    with serve({}) as closed:
        url = f"{closed.url}/content"
    path = tmp_path / "content"
    with pytest.raises(FileNotFoundError) as caught:
        download(url, path, len(CONTENT), SHA256)
    progress = f"after 0 of {len(CONTENT):,} bytes: Connection refused"
    assert str(caught.value) == f"cannot download {url} ({progress}); run again, or put it at {path} by hand"


def test_a_failure_leaves_no_partial_file(tmp_path):
    def chunks():
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        cached_file(tmp_path / "kept", chunks)
    assert visible(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    on_full_disk = partial(open, "/dev/full")
    monkeypatch.setattr(data_cache, "open", lambda _, *args, **options: on_full_disk(*args, **options), raising=False)
    with pytest.raises(OSError, match=r"cannot write .*kept \(No space left on device\); make room, or set EXPIRE"):
        cached_file(tmp_path / "kept", lambda: [b"half"])


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file .*; set EXPIRE_SPAN_CACHE"):
        cached_file(tmp_path / "file" / "kept", lambda: [b"all"])


def generate(path, log):
    def chunks():
        with open(log, "a") as file:
            file.write("generated\n")
        time.sleep(0.2)
        yield b"content"

    cached_file(path, chunks)


def test_several_processes_generate_a_file_only_once(tmp_path):
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "kept", tmp_path / "log")
    processes = [context.Process(target=generate, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "kept").read_bytes() == b"content"
    assert (tmp_path / "log").read_text() == "generated\n"


def test_an_array_is_generated_once_in_pieces_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    dtype = np.dtype([("pair", "u1", 2), ("number", "<i4")])
    expected = np.zeros((5, 3), dtype)
    expected["number"] = np.arange(15).reshape(5, 3)
    calls = []

    def pieces():
        calls.append(1)
        yield from (expected[:2], expected[2:])

    for _ in range(2):
        array = cached_array("numbers", expected.shape, dtype, pieces)
        assert isinstance(array, np.memmap)
        assert (array == expected).all()
    assert len(calls) == 1
    assert visible(tmp_path) == ["numbers.npy"]


def test_the_environment_chooses_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPIRE_SPAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "expire-span"
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")
