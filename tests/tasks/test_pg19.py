import hashlib
import json
import os

import numpy as np
import pytest
from file_server import serve

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
    """A few invented books in place of PG-19's, and nothing to download any from."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    for book_path, text in BOOKS.items():
        put(tmp_path / "books", book_path, text.encode())
    publish(monkeypatch, {book_path: text.encode() for book_path, text in BOOKS.items()})
    monkeypatch.setattr(pg19, "URL", "http://127.0.0.1:1")
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    return tmp_path / "books"


def unreachable(*_, **__):
    raise ConnectionError("no network")


@pytest.fixture
def server(monkeypatch):
    with serve({f"/{path}": text.encode() for path, text in BOOKS.items()}) as server:
        monkeypatch.setattr(pg19, "URL", server.url)
        yield server


def hub(books, requested_splits):
    """A load_dataset that has these books, as the Hub does: lines end with LF."""

    def load_dataset(name, split, streaming):
        assert (name, streaming) == ("emozilla/pg19", True)
        requested_splits.append(split)
        for path, text in books.items():
            folder, _, file = path.partition("/")
            if folder == split:
                url = f"http://www.gutenberg.org/ebooks/{file.removesuffix('.txt')}"
                yield {"url": url, "text": text.replace("\r\n", "\n").replace("\r", "\n")}

    return load_dataset


def put(folder, book_path, content):
    (folder / book_path).parent.mkdir(parents=True, exist_ok=True)
    (folder / book_path).write_bytes(content)


def publish(monkeypatch, books):
    index = {"train": [], "valid": [], "test": []}
    for book_path, content in books.items():
        split = book_path.split("/")[0].replace("validation", "valid")
        index[split].append(Book(book_path, len(content), hashlib.sha256(content).hexdigest()[:8]))
    monkeypatch.setattr(pg19, "read_index", lambda: index)


def read(task, split):
    return "".join((task.vocab + "?")[token] for token in task.splits[split])


def lines(*book_paths):
    return "".join(BOOKS[book_path] for book_path in book_paths).replace("\r\n", "\n").replace("\r", "\n")


def test_a_split_is_its_books_one_after_another_as_read_in_text_mode(folder):
    task = PG19(folder)
    assert read(task, "train") == lines("train/10.txt", "train/90.txt", "train/101.txt")
    assert read(task, "test") == lines("test/8.txt", "test/9.txt")
    assert all(isinstance(part, np.memmap) and part.dtype == np.uint16 for part in task.splits.values())


def test_the_vocabulary_is_that_of_the_training_books_by_code_point_and_others_are_counted(folder):
    task = PG19(folder)
    assert list(task.vocab) == sorted(set(lines("train/10.txt", "train/90.txt", "train/101.txt")))
    assert task.vocab_size == task.num_classes == len(task.vocab) + 1
    assert read(task, "valid").startswith("the bad ?and? is n?t in the train\n")
    unknown = {split: counts["unknown"] for split, counts in task.data_info.items()}
    assert unknown == {"train": 0, "valid": 120, "test": 0}


def test_bytes_per_token_are_the_mean_length_of_a_character_in_utf8(folder):
    text = lines("train/10.txt", "train/90.txt", "train/101.txt")
    assert PG19(folder).bytes_per_token("train") == len(text.encode()) / len(text) > 1.05


def test_num_books_keeps_the_first_training_books_and_whole_valid_and_test_splits(folder):
    task = PG19(folder, num_books=1)
    assert read(task, "train") == lines("train/10.txt")
    assert {split: (counts["num_books"], counts["num_published"]) for split, counts in task.data_info.items()} == {
        "train": (1, 3), "valid": (1, 1), "test": (2, 2),
    }  # fmt: skip
    for books in (0, 4):
        with pytest.raises(ValueError, match=rf"task\.num_books must be from 1 to 3, got {books}"):
            PG19(folder, num_books=books)


def test_missing_books_may_be_skipped(folder):
    (folder / "train/10.txt").unlink()
    task = PG19(folder, on_missing="skip")
    assert read(task, "train") == lines("train/101.txt")
    assert task.data_info["train"]["num_books"] == 2
    (folder / "validation/7.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no book of PG-19's valid split; use task.on_missing=download"):
        PG19(folder, on_missing="skip")
    with pytest.raises(ValueError, match=r"task.on_missing must be download or skip, got ignore"):
        PG19(folder, on_missing="ignore")


def test_books_are_tokenized_once(folder, monkeypatch):
    before = read(PG19(folder), "train")
    monkeypatch.setattr(PG19, "read_books", None)
    assert read(PG19(folder), "train") == before


@pytest.mark.parametrize("written", [0, 1, 1839, 1840, 1841, 2999])
def test_an_interrupted_tokenization_resumes_where_it_stopped(folder, written):
    whole = PG19(folder)
    path = whole.prepared / "train.uint16"
    content = path.read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(content[:written])
    again = PG19(folder)
    assert (again.prepared / "train.uint16").read_bytes() == content
    assert not list(again.prepared.glob("*.part"))


def test_books_that_an_interrupted_process_has_tokenized_are_not_read_again(folder, monkeypatch):
    whole = PG19(folder)
    path = whole.prepared / "train.uint16"
    path.rename(path.with_suffix(".part"))
    starts = []
    monkeypatch.setattr(PG19, "read_books", lambda self, split, first=0: starts.append(first) or iter(()))
    PG19(folder)
    assert starts == [3]


def test_the_published_empty_book_needs_no_server(folder):
    (folder / "train/90.txt").unlink()
    PG19(folder)
    assert (folder / "train/90.txt").read_bytes() == b""


def cached_books(tmp_path):
    return sorted(os.fspath(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.txt"))


def test_missing_books_are_downloaded_once(folder, server, tmp_path, monkeypatch):
    before = read(PG19(folder), "train")
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    assert read(PG19(), "train") == before
    assert cached_books(tmp_path / "another" / "pg19") == sorted(BOOKS)
    assert sorted(path for path, _ in server.requests) == sorted(f"/{path}" for path, text in BOOKS.items() if text)
    monkeypatch.setattr(pg19, "fetch", None)
    assert read(PG19(num_books=2), "train") == lines("train/10.txt", "train/90.txt")


def test_whole_splits_come_from_the_hub_and_are_the_published_files(folder, tmp_path, monkeypatch):
    before, requested_splits = read(PG19(folder), "train"), []
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(
        "datasets.load_dataset", hub(BOOKS | {"train/101.txt": "a\r\nb", "train/90.txt": ""}, requested_splits)
    )
    publish(monkeypatch, {path: text.encode() for path, text in BOOKS.items() if path != "train/101.txt"})
    assert read(PG19(), "train") == before.removesuffix(lines("train/101.txt"))
    assert requested_splits == ["train", "validation", "test"]
    for path in cached_books(tmp_path / "another" / "pg19"):
        assert (tmp_path / "another" / "pg19" / path).read_bytes() == BOOKS[path].encode()


def test_a_book_that_the_hub_does_not_have_as_published_is_downloaded_itself(folder, server, tmp_path, monkeypatch):
    before, requested_splits = read(PG19(folder), "test"), []
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr("datasets.load_dataset", hub(BOOKS | {"test/8.txt": "another edition"}, requested_splits))
    assert read(PG19(), "test") == before
    assert [path for path, _ in server.requests] == ["/train/101.txt", "/test/8.txt"], "101 has a lone CR"


def test_a_few_missing_books_are_not_looked_for_on_the_hub(folder, server, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", hub({}, requested_splits := []))
    (folder / "train/101.txt").unlink()
    PG19(folder)
    assert requested_splits == []
    assert server.requests == [("/train/101.txt", 0)]


def test_without_a_network_the_error_says_where_to_put_the_book(folder):
    (folder / "test/9.txt").unlink()
    message = r"^cannot download .*/test/9.txt \(.*put it at .*books/test/9.txt by hand$"
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
    [(b"caf\xe9", r"byte 3 of .*9.txt is not UTF-8; delete it"), (b"", r"test split in .* nothing but an empty book")],
)
def test_books_that_are_not_text_are_refused_by_name(folder, monkeypatch, content, message):
    put(folder, "test/9.txt", content)
    others = {book_path: text.encode() for book_path, text in BOOKS.items() if not book_path.startswith("test")}
    publish(monkeypatch, others | {"test/9.txt": content})
    with pytest.raises(ValueError, match=message):
        PG19(folder)


def test_the_index_has_all_published_books():
    published = read_index()
    assert {split: len(books) for split, books in published.items()} == {"train": 28_602, "valid": 50, "test": 100}
    assert sum(book.size for books in published.values() for book in books) == 11_736_553_257
    assert [book.path for books in published.values() for book in books if book.size == 0] == ["train/90.txt"]
    assert published["valid"][0] == Book("validation/356.txt", *published["valid"][0][1:])


@pytest.fixture
def run(folder, tmp_path):
    """The folder and the config of a run."""
    from tiny_config import tiny_config

    (tmp_path / "run").mkdir()
    return tmp_path / "run", tiny_config(
        f"task.data_dir={folder}", "task.num_books=null", "train.updates=2", task="pg19"
    )


def test_a_run_saves_its_vocabulary_and_reports_its_data_and_both_metrics(run, folder):
    from expire_span.runner.train import train

    path, config = run
    metrics = train(config, path)
    assert metrics["valid/bpc"] / metrics["valid/bpb"] == pytest.approx(PG19(folder).bytes_per_token("valid"))
    assert metrics["valid/bpc"] > metrics["valid/bpb"]
    assert json.loads((path / "vocab.json").read_bytes()) == list(PG19(folder).vocab)
    assert json.loads((path / "summary.json").read_bytes())["data"] == PG19(folder).data_info


def test_a_checkpoint_of_another_vocabulary_is_refused(run, tmp_path):
    from expire_span.runner.evaluate import evaluate_run
    from expire_span.runner.train import train

    path, config = run
    train(config, path)
    config.task.num_books = 1
    with pytest.raises(ValueError, match=r"holds a run with task.num_books=null"):
        train(config, path)
    with pytest.raises(
        ValueError, match=r"vocab.json has 18 characters or words, which are not the 13 of the task's text"
    ):
        evaluate_run(config, path, tmp_path)
