import errno
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import FileIO
from pathlib import Path

import numpy as np
import pytest

from expire_span.tasks.download import cache_folder, download, keep, keep_array

CONTENT = np.random.default_rng(0).integers(256, size=3_000_000, dtype=np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.server.ranges else 0
        self.server.asked.append(first)
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        self.end_headers()
        self.wfile.write(CONTENT[first : self.server.breaks_off])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """Serves CONTENT; tells where the requests began, and can break off or know no ranges."""
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.ranges, server.breaks_off = [], True, None
        server.url = f"http://127.0.0.1:{server.server_port}/content"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, folder: Path, sha256=SHA256):
    return download(server.url, folder / "content", len(CONTENT), sha256)


def visible(folder: Path):
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


def test_a_file_is_fetched_once(server, tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert fetch(server, folder).read_bytes() == CONTENT
    assert server.asked == [0]
    assert visible(folder) == ["content"]


def test_a_download_that_broke_off_goes_on_where_it_stopped(server, tmp_path):
    server.breaks_off = 1_200_000
    with pytest.raises(ValueError, match=r"broke off after 1,200,000 of 3,000,000 bytes; run again"):
        fetch(server, tmp_path)
    assert visible(tmp_path) == ["content.part"]
    server.breaks_off = None
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.asked == [0, 1_200_000]


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    (tmp_path / "content.part").write_bytes(b"wrong" * 100)
    server.ranges = False
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_the_file_not_put_in_place(server, tmp_path):
    with pytest.raises(ValueError, match=rf"content.part has sha256 {SHA256}, not {'0' * 64}: delete it and run again"):
        fetch(server, tmp_path, sha256="0" * 64)
    assert visible(tmp_path) == ["content.part"]


def test_the_beginning_of_a_checksum_will_do(server, tmp_path):
    assert fetch(server, tmp_path, sha256=SHA256[:8]).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_checked(server, tmp_path):
    (tmp_path / "content").write_bytes(CONTENT[:10])
    with pytest.raises(ValueError, match=r"content has 10 bytes, not 3,000,000: delete it"):
        fetch(server, tmp_path)
    assert server.asked == []


def test_without_a_network_it_says_where_to_put_the_file(tmp_path):
    with HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/content"
    place = tmp_path / "content"
    with pytest.raises(FileNotFoundError) as caught:
        download(url, place, len(CONTENT), SHA256)
    assert str(caught.value).startswith(f"cannot fetch {url} (")
    assert str(caught.value).endswith(f"run again, or put it at {place} by hand")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_no_half_file(tmp_path):
    class Full:
        def __iter__(self):
            yield b"half"
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        keep(tmp_path / "kept", Full)
    assert visible(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("expire_span.tasks.download.FileIO", lambda _, mode: FileIO("/dev/full", mode))
    with pytest.raises(OSError, match=r"cannot write .*kept \(No space left on device\); make room, or set EXPIRE"):
        keep(tmp_path / "kept", lambda: [b"half"])


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file .*; set EXPIRE_SPAN_CACHE"):
        keep(tmp_path / "file" / "kept", lambda: [b"all"])


def test_an_array_is_made_once_in_pieces_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    kind = np.dtype([("pair", "u1", 2), ("number", "<i4")])
    whole = np.zeros((5, 3), kind)
    whole["number"] = np.arange(15).reshape(5, 3)
    calls = []

    def pieces():
        calls.append(1)
        yield from (whole[:2], whole[2:])

    for _ in range(2):
        array = keep_array("numbers", whole.shape, kind, pieces)
        assert isinstance(array, np.memmap)
        assert (array == whole).all()
    assert len(calls) == 1
    assert visible(tmp_path) == ["numbers.npy"]


def test_the_cache_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPIRE_SPAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "expire-span"
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
