import gzip
import lzma

import numpy as np
import pytest
import torch

from expire_span.tasks.base import IGNORE_INDEX
from expire_span.tasks.text import Text
from expire_span.tasks.token_stream import TokenStream

WORDS = "Grüße an 日本 😀, and a plain tail of letters. " * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.mark.parametrize(("length", "batch", "block"), [(101, 4, 5), (98, 4, 7), (50, 7, 16), (7, 4, 3), (2, 3, 2)])
def test_evaluation_scores_every_token_but_the_first_once_and_in_order(length, batch, block):
    array = np.arange(length, dtype=np.uint16)
    scored = []
    for tokens, targets, *_ in TokenStream(array, batch, block, endless=False, name="it"):
        assert tokens.shape == targets.shape
        assert (
            tokens.shape[1] == block or tokens.shape[1] - (targets != IGNORE_INDEX).any(0).sum() < 8
        )  # the last block
        assert tokens.dtype == targets.dtype == torch.int64
        inside = targets != IGNORE_INDEX
        assert torch.equal(tokens[inside] + 1, targets[inside])
        scored += targets[inside].tolist()
    assert sorted(scored) == list(range(1, length))


def test_streams_are_contiguous_from_block_to_block():
    blocks = list(TokenStream(np.arange(81), 4, 5, endless=False, name="it"))
    tokens = torch.cat([block.tokens for block in blocks], dim=1)
    assert tokens.tolist() == [list(range(first, first + 20)) for first in (0, 20, 40, 60)]


def test_training_reads_on_into_the_next_part_and_from_the_end_to_the_start():
    stream = TokenStream(np.arange(11), 2, 4, endless=True, name="it")
    blocks = [next(stream) for _ in range(5)]
    tokens, targets = (torch.cat([block[i] for block in blocks], dim=1) for i in (0, 1))
    assert tokens[0].tolist() == [*range(10), *range(10)]
    assert tokens[1].tolist() == [*range(5, 10), *range(10), *range(5)]
    assert torch.equal(targets, tokens + 1)


def test_a_saved_stream_resumes_where_it_was_saved(file):
    stream, resumed = (Text(file).stream("train", 3, 16) for _ in range(2))
    for _ in range(70):
        next(stream)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(70):
        for one, other in zip(next(stream)[:2], next(resumed)[:2], strict=True):
            assert torch.equal(one, other)


def test_splits_follow_each_other_and_cover_the_text(file):
    task = Text(file, valid_fraction=0.2, test_fraction=0.1)
    content = WORDS.encode()
    assert b"".join(task.splits[split].tobytes() for split in ("train", "valid", "test")) == content
    fractions = [len(task.splits[split]) / len(content) for split in ("valid", "test")]
    assert fractions == pytest.approx([0.2, 0.1], abs=1e-3)
    assert task.vocab_size == 256
    assert task.bytes_per_token("test") == 1.0


def test_a_folder_is_its_files_in_order_and_packed_ones_are_unpacked(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"first ")
    (tmp_path / "b" / "c.xz").write_bytes(lzma.compress(b"second "))
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"third"))
    splits = Text(tmp_path).splits
    assert b"".join(part.tobytes() for part in splits.values()) == b"first second third"


def test_tokens_are_the_characters_of_the_train_split_and_one_for_all_others(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabcabcabcabcaéaa" + "a", encoding="utf-8")
    task = Text(path, tokenizer="char", valid_fraction=0.0, test_fraction=0.25)
    assert task.vocab_size == 4
    assert (task.vocab, task.extra_metrics) == ("abc", ("bpc",))
    assert task.splits["train"].tolist() == [0, 1, 2] * 5
    assert task.splits["test"].tolist() == [0, 3, 0, 0, 0]
    assert task.unknown == {"train": 0, "valid": 0, "test": 1}


def test_bytes_per_character_are_those_of_the_targets(file):
    task = Text(file, tokenizer="char", valid_fraction=0.3, test_fraction=0.3)
    start = len(task.splits["train"])
    targets = WORDS[start + 1 : start + len(task.splits["valid"])]
    assert task.bytes_per_token("valid") == pytest.approx(len(targets.encode()) / len(targets))
    assert task.bytes_per_token("valid") > 1.1


def test_unreadable_texts_are_refused_by_name(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"task\.path=nowhere\.txt does not exist"):
        Text("nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"task\.path=.* is a folder without files"):
        Text(tmp_path / "empty")
    (tmp_path / "empty" / "nothing.txt").touch()
    for tokenizer in ("byte", "char"):
        with pytest.raises(ValueError, match=r"task\.path=.* is empty"):
            Text(tmp_path / "empty", tokenizer=tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"byte 3 of .*latin.txt is not UTF-8; .* or use task.tokenizer=byte"):
        Text(tmp_path / "latin.txt", tokenizer="char")
    for name in ("broken.xz", "broken.gz"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(ValueError, match=rf"task\.path: .*{name} cannot be unpacked"):
            Text(tmp_path / name)


def test_a_damaged_archive_is_refused_by_name(tmp_path):
    whole = gzip.compress(bytes(range(256)) * 40)
    (tmp_path / "damaged.gz").write_bytes(whole[:40] + bytes(20) + whole[60:])
    with pytest.raises(ValueError, match=r"task\.path: .*damaged.gz cannot be unpacked"):
        Text(tmp_path / "damaged.gz")


def test_hidden_files_are_left_out(tmp_path, file):
    folder = tmp_path / ".own" / "texts"  # what lies above the folder may be hidden
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "index").write_bytes(b"\xff\xfe")
    (folder / ".DS_Store").write_bytes(b"\xff\xfe")
    (folder / "a.txt").write_text(WORDS, encoding="utf-8")
    hidden, plain = Text(folder).data_info, Text(file).data_info
    assert hidden["files"].pop("skipped") == ".DS_Store (hidden), .git (hidden)"
    assert plain["files"].pop("skipped") == ""
    assert hidden == plain


def test_a_text_without_a_train_split_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match=r"has 1 characters, of which none are for training"):
        Text(tmp_path / "short.txt", tokenizer="char", valid_fraction=0.4, test_fraction=0.4)


def test_an_unknown_tokenizer_and_impossible_fractions_are_refused_by_name(file):
    with pytest.raises(ValueError, match=r"task\.tokenizer must be byte or char, got word"):
        Text(file, tokenizer="word")
    with pytest.raises(ValueError, match=r"task\.valid_fraction and task\.test_fraction must leave a share"):
        Text(file, valid_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match=r"task\.valid_fraction and task\.test_fraction .*, got nan and 0.05"):
        Text(file, valid_fraction=float("nan"))


def test_a_text_that_is_too_short_is_refused_with_the_length_needed(file):
    with pytest.raises(ValueError, match=r"the train split of task\.path=.* at least 65,537 are needed for 64 streams"):
        Text(file).stream("train", 64, 1024)
    with pytest.raises(ValueError, match=r"the valid split of task\.path=.* has 0 tokens, at least 2 are needed"):
        Text(file, valid_fraction=0).stream("valid", 64, 1024)
