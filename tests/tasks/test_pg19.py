import hashlib
import json

import numpy as np
import pytest
from tiny import tiny

from expire_span.runner.loop import evaluate_run, train
from expire_span.tasks import pg19
from expire_span.tasks.pg19 import PG19, Book, read_index

BOOKS = {
    "train/10.txt": "in the beginning\r\nwas é\r\n" * 40,
    "train/90.txt": "",
    "train/101.txt": "and 日本 there\rwas z " * 40,
    "validation/7.txt": "the bad ñandú is not in the train\r\n" * 40,
    "test/8.txt": "the end is near\r\n" * 40,
    "test/9.txt": "the end is here",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A few made books in PG-19's place, and nothing to fetch any from."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    for place, text in BOOKS.items():
        put(tmp_path / "books", place, text.encode())
    publish(monkeypatch, {place: text.encode() for place, text in BOOKS.items()})
    monkeypatch.setattr(pg19, "URL", "http://127.0.0.1:1")
    return tmp_path / "books"


def put(folder, place, content):
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_bytes(content)


def publish(monkeypatch, books):
    index = {"train": [], "valid": [], "test": []}
    for place, content in books.items():
        split = place.split("/")[0].replace("validation", "valid")
        index[split].append(Book(place, len(content), hashlib.sha256(content).hexdigest()[:8]))
    monkeypatch.setattr(pg19, "read_index", lambda: index)


def read(task, split):
    return "".join((task.alphabet + "?")[token] for token in task.parts[split])


def lines(*places):
    return "".join(BOOKS[place] for place in places).replace("\r\n", "\n").replace("\r", "\n")


def test_a_part_is_its_books_one_after_another_as_read_in_text_mode(folder):
    task = PG19(folder)
    assert read(task, "train") == lines("train/10.txt", "train/90.txt", "train/101.txt")
    assert read(task, "test") == lines("test/8.txt", "test/9.txt")
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 for part in task.parts.values())


def test_the_alphabet_is_that_of_the_training_books_by_code_point_and_others_are_counted(folder):
    task = PG19(folder)
    assert list(task.alphabet) == sorted(set(lines("train/10.txt", "train/90.txt", "train/101.txt")))
    assert task.vocabulary == task.classes == len(task.alphabet) + 1
    assert read(task, "valid").startswith("the bad ?and? is n?t in the train\n")
    assert {split: counts["unknown"] for split, counts in task.data.items()} == {"train": 0, "valid": 120, "test": 0}


def test_bytes_per_token_are_those_of_utf8(folder):
    text = lines("train/10.txt", "train/90.txt", "train/101.txt")
    assert PG19(folder).bytes_per_token("train") == len(text.encode()) / len(text) > 1.05


def test_fewer_books_are_the_first_of_the_train_part_and_the_others_are_whole(folder):
    task = PG19(folder, books=1)
    assert read(task, "train") == lines("train/10.txt")
    assert {split: (counts["books"], counts["of"]) for split, counts in task.data.items()} == {
        "train": (1, 3), "valid": (1, 1), "test": (2, 2),
    }  # fmt: skip
    for books in (0, 4):
        with pytest.raises(ValueError, match=rf"task\.books must be from 1 to 3, got {books}"):
            PG19(folder, books=books)


def test_missing_books_may_be_skipped(folder):
    (folder / "train/10.txt").unlink()
    task = PG19(folder, missing="skip")
    assert read(task, "train") == lines("train/101.txt")
    assert task.data["train"]["books"] == 2
    (folder / "validation/7.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no book of PG-19's valid part; use task.missing=fetch"):
        PG19(folder, missing="skip")
    with pytest.raises(ValueError, match=r"task.missing must be fetch or skip, got ignore"):
        PG19(folder, missing="ignore")


def test_tokens_are_made_once(folder, monkeypatch):
    before = read(PG19(folder), "train")
    monkeypatch.setattr(PG19, "read", None)
    assert read(PG19(folder), "train") == before


@pytest.mark.parametrize("written", [0, 1, 1839, 1840, 1841, 2999])
def test_tokens_go_on_where_they_broke_off(folder, written):
    whole = PG19(folder)
    path = whole.prepared / "train.uint16"
    content = path.read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(content[:written])
    again = PG19(folder)
    assert (again.prepared / "train.uint16").read_bytes() == content
    assert not list(again.prepared.glob("*.part"))


def test_a_book_on_its_way_to_the_tokens_of_an_earlier_start_is_not_read_again(folder, monkeypatch):
    whole = PG19(folder)
    path = whole.prepared / "train.uint16"
    path.rename(path.with_suffix(".part"))
    starts = []
    monkeypatch.setattr(PG19, "read", lambda self, split, first=0: starts.append(first) or iter(()))
    PG19(folder)
    assert starts == [3]


def test_the_published_empty_book_needs_no_server(folder):
    (folder / "train/90.txt").unlink()
    PG19(folder)
    assert (folder / "train/90.txt").read_bytes() == b""


def test_missing_books_are_fetched_each_once(folder, tmp_path, monkeypatch):
    before = read(PG19(folder), "train")
    monkeypatch.setattr(pg19, "URL", folder.as_uri())
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    assert read(PG19(), "train") == before
    assert sorted(path.name for path in (tmp_path / "another" / "pg19").glob("*/*")) == [
        "10.txt", "101.txt", "7.txt", "8.txt", "9.txt", "90.txt",
    ]  # fmt: skip
    monkeypatch.setattr(pg19, "fetch", None)
    assert read(PG19(books=2), "train") == lines("train/10.txt", "train/90.txt")


def test_without_a_network_it_says_where_to_put_the_book(folder):
    (folder / "test/9.txt").unlink()
    message = r"^cannot fetch .*/test/9.txt \(.*put it at .*books/test/9.txt by hand$"
    with pytest.raises(FileNotFoundError, match=message):
        PG19(folder)


def test_books_that_are_not_the_published_ones_are_refused_by_name(folder, monkeypatch):
    put(folder, "test/9.txt", b"")
    with pytest.raises(ValueError, match=r"9.txt has 0 bytes, not 15: delete it and run again"):
        PG19(folder)
    put(folder, "test/9.txt", b"THE END IS HERE")
    with pytest.raises(ValueError, match=r"9.txt has sha256 .*: delete it and run again"):
        PG19(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", r"byte 3 of .*9.txt is not UTF-8; delete it"), (b"", r"test part in .* nothing but an empty book")],
)
def test_what_cannot_be_text_is_refused_by_name(folder, monkeypatch, content, message):
    put(folder, "test/9.txt", content)
    others = {place: text.encode() for place, text in BOOKS.items() if not place.startswith("test")}
    publish(monkeypatch, others | {"test/9.txt": content})
    with pytest.raises(ValueError, match=message):
        PG19(folder)


def test_the_published_books_are_all_there():
    published = read_index()
    assert {split: len(books) for split, books in published.items()} == {"train": 28_602, "valid": 50, "test": 100}
    assert sum(book.size for books in published.values() for book in books) == 11_736_553_257
    assert [book.place for books in published.values() for book in books if book.size == 0] == ["train/90.txt"]
    assert published["valid"][0] == Book("validation/356.txt", *published["valid"][0][1:])


@pytest.fixture
def run(folder, tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run", tiny(f"task.folder={folder}", "task.books=null", "train.updates=2", task="pg19")


def test_a_run_keeps_its_alphabet_and_says_what_it_read_and_counts_bits_twice(run, folder):
    place, config = run
    figures = train(config, place)
    assert figures["valid/bpc"] / figures["valid/bpb"] == pytest.approx(PG19(folder).bytes_per_token("valid"))
    assert figures["valid/bpc"] > figures["valid/bpb"]
    assert json.loads((place / "alphabet.json").read_bytes()) == list(PG19(folder).alphabet)
    assert json.loads((place / "summary.json").read_bytes())["data"] == PG19(folder).data


def test_a_checkpoint_of_another_vocabulary_is_refused(run, folder, tmp_path):
    place, config = run
    train(config, place)
    config.task.books = 1
    message = r"alphabet.json has 18 characters or words, and not the 13 of the task's text: use the text"
    with pytest.raises(ValueError, match=message):
        train(config, place)
    with pytest.raises(ValueError, match=message):
        evaluate_run(config, place, tmp_path)
