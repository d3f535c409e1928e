"""Every reader of files ends with one line, or works, whatever is in the file: a seeded table of broken inputs."""

import ast
import gzip
import hashlib
import json
import lzma
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from expire_span.tasks import dialogue, enwik8, pg19, wikitext103
from expire_span.tasks.collision import Collision
from expire_span.tasks.dialogue import extract, load_dialogue
from expire_span.tasks.enwik8 import Enwik8
from expire_span.tasks.instruction_map import load_map
from expire_span.tasks.pg19 import PG19, Book
from expire_span.tasks.text import Text
from expire_span.tasks.wikitext103 import Wikitext103

UTTERANCES = [f"line {number}" for number in range(20)]
DIALOGUES = [{"agents": [], "speech": [text, None]} for text in UTTERANCES]
WORLD = {
    "rooms": ["a", "b"],
    "agents": ["c", "d", "e"],
    "nodes": {
        "a": {"name": "Hall", "neighbors": {"b": {}}},
        "b": {"name": "Yard", "neighbors": ["a"]},
        **{agent: {"name": agent * 3} for agent in "cde"},
    },
}
BOOK = b"the end is near\r\n" * 40
WORDS = {"train": " a b c . \n a b \n", "valid": " a . \n", "test": " b c \n"}
COLLISION = {"grid_size": 4, "num_colors": 2, "timesteps": 64, "eval_timesteps": 64, "num_simulations": 2}
HTML = b"<!DOCTYPE html>\n<html><body>Log in</body></html>"
OTHER_JSON = (None, True, 5, -0.5, "a", [], {}, [[]], [None], {"a": []}, [1e999], {"rooms": 5}, {"vocab": 5})


def damage(content: bytes, random: Random):
    """Name and content of many broken versions of a file."""
    yield from {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "last byte lost": content[:-1],
        "first byte lost": content[1:],
        "doubled": content * 2,
        "zeros": bytes(len(content)),
        "NUL": b"\0",
        "HTML": HTML,
        "latin-1": "café ".encode("latin-1") * 20,
        "UTF-16": '["a"]'.encode("utf-16"),
        "BOM": b"\xef\xbb\xbf" + content,
        "nested": b"[" * 100_000,
        "nested and closed": b"[" * 100_000 + b"]" * 100_000,
        "nested objects": b'{"a":' * 100_000,
        "long number": b"9" * 10_000,
        "pickled number": pickle.dumps(5),
        "pickled None": pickle.dumps(None),
        "pickled text": pickle.dumps("speech"),
        "pickled list": pickle.dumps([]),
        "pickled numbers": pickle.dumps([1, 2]),
        "pickled speech": pickle.dumps([{"speech": 5}, {"speech": [5]}]),
        "pickled dict": pickle.dumps({0: {"speech": ["a"]}}),
        "pickled function": pickle.dumps(os.system),
        "gzip": gzip.compress(content),
        "xz": lzma.compress(content)[:-4],
        "npy of objects": npy(np.array([{}], object)),
        "npy": npy(np.zeros(3)),
    }.items()
    for number, other in enumerate(OTHER_JSON):
        yield f"JSON {number}", json.dumps(other).encode()
    for number in range(8):
        flipped = bytearray(content)
        for _ in range(3):
            flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        yield f"flipped {number}", bytes(flipped)
        yield f"noise {number}", random.randbytes(random.randrange(1, 3000))
        yield f"cut {number}", content[: random.randrange(len(content))]


def npy(array):
    path = Path(os.environ["EXPIRE_SPAN_CACHE"]) / "array"
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, array)
    return path.read_bytes()


def worlds(random):
    """Worlds with one value replaced by one of another type."""
    for _ in range(150):
        world = json.loads(json.dumps(WORLD))
        holder, key = random.choice(list(places(world)))
        holder[key] = random.choice([*OTHER_JSON, ["a", "b"], [["b"]], {"b": 5}, "b"])
        yield json.dumps(world).encode()


def places(value):
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], list | dict):
            yield from places(value[key])


def zipped(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Small files in place of the published ones, and nothing to download any from."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    for module in (enwik8, pg19, wikitext103, dialogue):
        monkeypatch.setattr(module, "URL", "http://127.0.0.1:1")
    monkeypatch.setattr("datasets.load_dataset", None)
    num_words = {split: len(text.split()) + text.count("\n") for split, text in WORDS.items()}
    monkeypatch.setattr(wikitext103, "NUM_WORDS", num_words)
    monkeypatch.setattr(wikitext103, "VOCAB_SIZE", 5)
    monkeypatch.setattr(enwik8, "SIZE", len(BOOK))
    monkeypatch.setattr(enwik8, "SHA256", hashlib.sha256(BOOK).hexdigest())
    books = {
        split: [Book(f"{folder}/1.txt", len(BOOK), hashlib.sha256(BOOK).hexdigest()[:8])]
        for split, folder in (("train", "train"), ("valid", "validation"), ("test", "test"))
    }
    monkeypatch.setattr(pg19, "read_index", lambda: books)
    return tmp_path / "cache"


def readers(cache, monkeypatch):
    """For each reader: the file, what it holds when all is well, and how it is read."""
    data = cache.parent / "data"
    for folder in ("train", "validation", "test"):
        (data / folder).mkdir(parents=True)
        (data / folder / "1.txt").write_bytes(BOOK)
    for split, text in WORDS.items():
        (data / f"wiki.{split}.tokens").write_text(text)
    (data / "enwik8").write_bytes(BOOK)
    books = PG19(data).prepared
    Wikitext103(data)
    Collision(**COLLISION, eval_simulations=2).records("test")
    (array,) = cache.glob("collision*.npy")
    utterances = json.dumps(dict.fromkeys(WORDS, UTTERANCES)).encode()
    archive = zipped(cache / "archive", "enwik8", BOOK)
    monkeypatch.setattr(enwik8, "ZIP_SIZE", len(archive))
    monkeypatch.setattr(enwik8, "ZIP_SHA256", hashlib.sha256(archive).hexdigest())
    collision = lambda: Collision(**COLLISION, eval_simulations=2).records("test").sum  # noqa: E731

    def unpack_enwik8():
        (cache / "enwik8").unlink(missing_ok=True)
        Enwik8()

    files = {
        "text as bytes": (data / "a.txt", BOOK, lambda: Text(data / "a.txt")),
        "text as characters": (data / "b.txt", BOOK, lambda: Text(data / "b.txt", tokenizer="char")),
        "text in zip": (data / "a.zip", zipped(cache / "zip", "a", BOOK), lambda: Text(data / "a.zip")),
        "utterances": (data / "u.json", json.dumps(UTTERANCES).encode(), lambda: load_dialogue(data / "u.json")),
        "dialogues": (data / "d.pkl", pickle.dumps(DIALOGUES), lambda: load_dialogue(data / "d.pkl")),
        "LIGHT's utterances": (cache / "light-utterances.json", utterances, lambda: load_dialogue("light")),
        "map": (data / "map.json", json.dumps(WORLD).encode(), lambda: load_map(data / "map.json")),
        "book": (data / "test" / "1.txt", BOOK, lambda: [*PG19(data).read_books("test")]),
        "survey": (books / "vocab.json", (books / "vocab.json").read_bytes(), lambda: PG19(data)),
        "tokens of books": (books / "test.uint16", (books / "test.uint16").read_bytes(), lambda: PG19(data)),
        "enwik8": (data / "enwik8", BOOK, lambda: Enwik8(data)),
        "enwik8's archive": (cache / "enwik8.zip", archive, unpack_enwik8),
        "words": (cache / "wikitext103" / "words.txt", None, lambda: Wikitext103(data)),
        "tokens of words": (cache / "wikitext103" / "test.int32", None, lambda: Wikitext103(data)),
        "generated data": (array, array.read_bytes(), collision),
    }
    return {name: (path, content or path.read_bytes(), read) for name, (path, content, read) in files.items()}


def outcome(read, path, case):
    """Whether reading works, or ends with one line that says which file it is."""
    try:
        read()
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message.strip(), f"{case}: {message}"
        assert path.name in message or path.stem in message, f"{case}: no name in {message!r}"
        assert len(message) < 600, f"{case}: {message}"
        return "one line"
    except BaseException as error:
        raise AssertionError(f"{case} ends with {error!r}") from error
    return "works"


def test_broken_inputs_end_in_one_line_or_work(cache, monkeypatch, record_property):
    random, counts = Random(0), Counter()
    for name, (path, content, read) in readers(cache, monkeypatch).items():
        path.write_bytes(content)
        read()
        cases = dict(damage(content, random))
        if name == "map":
            cases |= {f"world {number}": world for number, world in enumerate(worlds(random))}
        for case, broken in cases.items():
            path.write_bytes(broken)
            counts[outcome(read, path, f"{name}, {case}")] += 1
        path.unlink()
        os.mkfifo(path)
        assert outcome(read, path, f"{name}, named pipe") == "one line", name
        path.unlink()
        path.mkdir()
        folder = outcome(read, path, f"{name}, folder")
        assert folder == "one line", name
        counts["one line"] += 2
        path.rmdir()
        path.write_bytes(content)
        if os.geteuid():  # root may read everything
            path.chmod(0)
            assert outcome(read, path, f"{name}, no permission") == "one line"
            path.chmod(0o644)
    print(f"{counts.total()} broken inputs: {dict(counts)}")
    assert counts.total() > 1000


def test_what_is_prepared_from_published_files_has_not_changed(cache, monkeypatch):
    """If it is meant to change, change the names of these files too, so that those of before are not read."""
    files = readers(cache, monkeypatch)
    contents = {name: files[name][1] for name in ("survey", "tokens of books", "words", "tokens of words")}
    path = cache.parent / "d.pkl"
    path.write_bytes(pickle.dumps(DIALOGUES))
    contents["LIGHT's utterances"] = extract(path)
    assert {name: hashlib.sha256(content).hexdigest()[:8] for name, content in contents.items()} == {
        "LIGHT's utterances": "365651ba",
        "survey": "0fbdf491",
        "tokens of books": "4027b435",
        "tokens of words": "fab2f21b",
        "words": "3be79df1",
    }


def test_no_pickle_is_loaded_but_for_plain_data():
    """pickle.load, numpy's allow_pickle and torch's weights_only=False can run code that is in a file."""
    root = Path(__file__).parents[2]
    calls = []
    for path in [*root.glob("expire_span/**/*.py"), *root.glob("tasks/*.py"), *root.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                unsafe_torch = called == "torch.load" and keywords.get("weights_only") != "True"
                if called in ("pickle.load", "pickle.loads") or "allow_pickle" in keywords or unsafe_torch:
                    calls.append(f"{path.name}: {ast.unparse(node)}")
    assert calls == []
