import gzip
import lzma

import numpy as np
import pytest
import torch

from expire_span.tasks.stream import IGNORED
from expire_span.tasks.text import Text
from expire_span.tasks.tokens import TokenStream

WORDS = "Grüße an 日本 😀, and a plain tail of letters. " * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.mark.parametrize(("length", "batch", "block"), [(101, 4, 5), (98, 4, 7), (50, 7, 16), (7, 4, 3), (2, 3, 2)])
def test_evaluation_asks_for_every_token_but_the_first_once_and_in_its_place(length, batch, block):
    array = np.arange(length, dtype=np.uint16)
    asked = []
    for tokens, targets, *_ in TokenStream(array, batch, block, endless=False, name="it"):
        assert tokens.shape == targets.shape
        assert tokens.shape[1] == block or tokens.shape[1] - (targets != IGNORED).any(0).sum() < 8  # the last block
        assert tokens.dtype == targets.dtype == torch.int64
        inside = targets != IGNORED
        assert torch.equal(tokens[inside] + 1, targets[inside])
        asked += targets[inside].tolist()
    assert sorted(asked) == list(range(1, length))


def test_streams_are_contiguous_from_block_to_block():
    blocks = list(TokenStream(np.arange(81), 4, 5, endless=False, name="it"))
    tokens = torch.cat([block.tokens for block in blocks], dim=1)
    assert tokens.tolist() == [list(range(first, first + 20)) for first in (0, 20, 40, 60)]


def test_training_reads_on_through_the_next_part_and_from_the_end_to_the_start():
    stream = TokenStream(np.arange(11), 2, 4, endless=True, name="it")
    blocks = [next(stream) for _ in range(5)]
    tokens, targets = (torch.cat([block[i] for block in blocks], dim=1) for i in (0, 1))
    assert tokens[0].tolist() == [*range(10), *range(10)]
    assert tokens[1].tolist() == [*range(5, 10), *range(10), *range(5)]
    assert torch.equal(targets, tokens + 1)


def test_a_saved_stream_goes_on_where_it_was_saved(file):
    stream, resumed = (Text(file).stream("train", 3, 16) for _ in range(2))
    for _ in range(70):
        next(stream)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(70):
        for one, other in zip(next(stream)[:2], next(resumed)[:2], strict=True):
            assert torch.equal(one, other)


def test_parts_follow_each_other_and_are_the_whole(file):
    task = Text(file, valid=0.2, test=0.1)
    content = WORDS.encode()
    assert b"".join(task.parts[split].tobytes() for split in ("train", "valid", "test")) == content
    assert [len(task.parts[split]) / len(content) for split in ("valid", "test")] == pytest.approx([0.2, 0.1], abs=1e-3)
    assert task.vocabulary == 256
    assert task.bytes_per_token("test") == 1.0


def test_a_folder_is_its_files_in_order_and_packed_ones_are_unpacked(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"first ")
    (tmp_path / "b" / "c.xz").write_bytes(lzma.compress(b"second "))
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"third"))
    parts = Text(tmp_path).parts
    assert b"".join(part.tobytes() for part in parts.values()) == b"first second third"


def test_characters_are_those_of_the_train_part_and_one_for_the_unknown(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabcabcabcabcaéaa" + "a", encoding="utf-8")
    task = Text(path, unit="characters", valid=0.0, test=0.25)
    assert task.vocabulary == 4
    assert (task.alphabet, task.also) == ("abc", ("bpc",))
    assert task.parts["train"].tolist() == [0, 1, 2] * 5
    assert task.parts["test"].tolist() == [0, 3, 0, 0, 0]
    assert task.unknown == {"train": 0, "valid": 0, "test": 1}


def test_bytes_per_character_are_those_of_the_targets(file):
    task = Text(file, unit="characters", valid=0.3, test=0.3)
    start = len(task.parts["train"])
    targets = WORDS[start + 1 : start + len(task.parts["valid"])]
    assert task.bytes_per_token("valid") == pytest.approx(len(targets.encode()) / len(targets))
    assert task.bytes_per_token("valid") > 1.1


def test_what_cannot_be_read_is_refused_by_name(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"task\.path=nowhere\.txt does not exist"):
        Text("nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"task\.path=.* is a folder without files"):
        Text(tmp_path / "empty")
    (tmp_path / "empty" / "nothing.txt").touch()
    for unit in ("bytes", "characters"):
        with pytest.raises(ValueError, match=r"task\.path=.* is empty"):
            Text(tmp_path / "empty", unit=unit)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"byte 3 of .*latin.txt is not UTF-8; convert it, or use task.unit=bytes"):
        Text(tmp_path / "latin.txt", unit="characters")
    for name in ("broken.xz", "broken.gz"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(ValueError, match=rf"task\.path: .*{name} cannot be unpacked"):
            Text(tmp_path / name)


def test_a_damaged_archive_is_refused_by_name(tmp_path):
    whole = gzip.compress(bytes(range(256)) * 40)
    (tmp_path / "damaged.gz").write_bytes(whole[:40] + bytes(20) + whole[60:])
    with pytest.raises(ValueError, match=r"task\.path: .*damaged.gz cannot be unpacked"):
        Text(tmp_path / "damaged.gz")


def test_hidden_files_are_no_text(tmp_path, file):
    folder = tmp_path / ".own" / "texts"  # what lies above the folder may be hidden
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "index").write_bytes(b"\xff\xfe")
    (folder / ".DS_Store").write_bytes(b"\xff\xfe")
    (folder / "a.txt").write_text(WORDS, encoding="utf-8")
    assert Text(folder).data == Text(file).data


def test_a_text_without_a_training_part_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has 1 characters, of which none are for training"):
        Text(tmp_path / "short.txt", unit="characters", valid=0.4, test=0.4)


def test_a_share_or_unit_that_is_none_is_refused_by_name(file):
    with pytest.raises(ValueError, match=r"task\.unit must be bytes or characters, got words"):
        Text(file, unit="words")
    with pytest.raises(ValueError, match=r"task\.valid and task\.test must leave a share"):
        Text(file, valid=0.5, test=0.5)


def test_a_text_too_short_says_how_much_is_needed(file):
    with pytest.raises(ValueError, match=r"the train part of task\.path=.* at least 65,537 are needed for 64 streams"):
        Text(file).stream("train", 64, 1024)
    with pytest.raises(ValueError, match=r"the valid part of task\.path=.* has 0 tokens, at least 2 are needed"):
        Text(file, valid=0).stream("valid", 64, 1024)
