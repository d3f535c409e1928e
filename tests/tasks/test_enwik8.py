import hashlib
import os
import zipfile

import numpy as np
import pytest

from expire_span.tasks import enwik8
from expire_span.tasks.enwik8 import Enwik8


@pytest.fixture
def content(monkeypatch):
    """A small file in enwik8's place."""
    content = np.random.default_rng(0).integers(256, size=10_000, dtype=np.uint8).tobytes()
    monkeypatch.setattr(enwik8, "SIZE", len(content))
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_the_splits_are_ninety_and_five_and_five_percent(tmp_path, content):
    (tmp_path / "enwik8").write_bytes(content)
    splits = Enwik8(tmp_path).splits
    assert [splits[split].tobytes() for split in ("train", "valid", "test")] == [
        content[:9000],
        content[9000:9500],
        content[9500:],
    ]


def test_the_file_is_unpacked_from_its_archive_once(tmp_path, content, monkeypatch):
    archive = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("enwik8", content)
    monkeypatch.setattr(enwik8, "ZIP_SIZE", archive.stat().st_size)
    monkeypatch.setattr(enwik8, "ZIP_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", os.fspath(tmp_path))
    assert Enwik8().splits["train"].tobytes() == content[:9000]
    archive.unlink()
    batch = next(Enwik8().stream("train", 2, 100))
    assert batch.tokens[0].tolist() == list(content[:100])
    assert batch.targets[1].tolist() == list(content[4500:4600]), "the second half begins with its 4500th byte's target"


def test_a_file_that_is_not_enwik8_is_refused(tmp_path, content):
    (tmp_path / "enwik8").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"enwik8 has 9,999 bytes, not 10,000: delete it and run again"):
        Enwik8(tmp_path)
    (tmp_path / "enwik8").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"enwik8 has sha256 .*: delete it and run again"):
        Enwik8(tmp_path)


def test_the_published_sizes_add_up():
    assert enwik8.SIZE == 100_000_000
    assert len(enwik8.SHA256) == len(enwik8.ZIP_SHA256) == 64
