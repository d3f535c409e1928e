import hashlib
import zipfile

import numpy as np
import pytest

from expire_span.tasks import wikitext103
from expire_span.tasks.wikitext103 import Wikitext103

TEXTS = {
    "train": " \n = The title = \n \n the cat sat , the dog sat . \n a cat <unk> naïve \n",
    "valid": " = The cat = \n the dog <unk> . \n",
    "test": " the naïve title , a dog . \n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three small files in Wikitext-103's place, and nothing to fetch any from."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wikitext103, "URL", "http://127.0.0.1:1/wikitext-103-v1.zip")
    monkeypatch.setattr(wikitext103, "WORDS", {"train": 21, "valid": 10, "test": 8})
    monkeypatch.setattr(wikitext103, "TYPES", 13)
    for split, text in TEXTS.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text, encoding="utf-8")
    return tmp_path


def visible(folder):
    return sorted(file.name for file in folder.iterdir() if file.suffix not in (".lock", ""))


def test_words_are_numbered_by_frequency_and_then_by_the_alphabet(folder):
    task = Wikitext103(folder)
    assert task.alphabet == ["<eos>", "=", "cat", "sat", "the", ",", ".", "<unk>", "The", "a", "dog", "naïve", "title"]
    assert task.vocabulary == task.classes == len(task.alphabet)


def test_every_word_and_every_end_of_a_line_is_a_token(folder):
    task = Wikitext103(folder)
    for split, text in TEXTS.items():
        words = [word for line in text.splitlines() for word in [*line.split(), "<eos>"]]
        assert [task.alphabet[token] for token in task.parts[split]] == words
        assert isinstance(task.parts[split], np.memmap)
        assert task.data[split] == {"words": len(words)}
    assert next(task.stream("test", 1, 7)).targets.tolist() == [task.parts["test"][1:].tolist()]


def test_once_prepared_it_needs_the_text_no_more(folder):
    before = Wikitext103(folder).parts["train"].tolist()
    for split in TEXTS:
        (folder / f"wiki.{split}.tokens").unlink()
    assert Wikitext103(folder).parts["train"].tolist() == before


def test_the_files_are_unpacked_from_their_archive(folder, monkeypatch):
    before = Wikitext103(folder).parts["train"].tolist()
    place = folder / "cache" / "wikitext103"
    for file in place.iterdir():
        file.unlink()
    with zipfile.ZipFile(place / "wikitext-103-v1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    content = (place / "wikitext-103-v1.zip").read_bytes()
    monkeypatch.setattr(wikitext103, "ZIP_SIZE", len(content))
    monkeypatch.setattr(wikitext103, "ZIP_SHA256", hashlib.sha256(content).hexdigest())
    assert Wikitext103().parts["train"].tolist() == before


def test_where_the_page_cannot_be_reached_a_mirror_has_the_same_lines(folder, monkeypatch):
    rows = {split: [{"text": line.strip()} for line in text.splitlines()] for split, text in TEXTS.items()}
    before = Wikitext103(folder).parts["train"].tolist()
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(folder / "another"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split: rows[split.replace("validation", "valid")])
    assert Wikitext103().parts["train"].tolist() == before


def test_without_a_network_it_says_what_is_missing_and_where_to_put_it(folder):
    (folder / "wiki.train.tokens").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Wikitext103(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/wiki.train.tokens is missing, and cannot fetch http://127.0.0.1:1/")
    assert message.endswith(f"put it at {folder}/wikitext-103-v1.zip by hand")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", b" a b \n", r"train.tokens has 3 words, not the published 21: delete it and run again"),
        ("train", b" a" * 20 + b"\n", r"train.tokens has 2 different words, not the published 13: delete it"),
        ("train", b" caf\xe9 noir\n", r"train.tokens is not UTF-8 .*; delete it and run again"),
        ("valid", b" the\n", r"valid.tokens has 2 words, not the published 10: delete it"),
        ("valid", b"", r"valid.tokens has 0 words, not the published 10: delete it"),
        ("test", b" the zebra\n", r"test.tokens has 'zebra', which the train part has not: delete it"),
    ],
)
def test_other_texts_are_refused_by_name(folder, split, content, message):
    (folder / f"wiki.{split}.tokens").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Wikitext103(folder)
    assert f"{split}.int32" not in visible(folder / "cache" / "wikitext103")
