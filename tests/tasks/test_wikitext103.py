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
    """Three small files in place of Wikitext-103's, and nothing to download any from."""
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wikitext103, "URL", "http://127.0.0.1:1/wikitext-103-v1.zip")
    monkeypatch.setattr(wikitext103, "NUM_WORDS", {"train": 21, "valid": 10, "test": 8})
    monkeypatch.setattr(wikitext103, "VOCAB_SIZE", 13)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    for split, text in TEXTS.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text, encoding="utf-8")
    return tmp_path


def unreachable(*_, **__):
    raise ConnectionError("no network")


def hub(texts):
    """A load_dataset that has these texts, as the Hub does: empty lines have no line end."""

    def load_dataset(*_, split):
        lines = texts[split.replace("validation", "valid")].splitlines()
        return [{"text": f"{line}\n" if line.strip() else ""} for line in lines]

    return load_dataset


def visible(folder):
    return sorted(file.name for file in folder.iterdir() if file.suffix not in (".lock", ""))


def test_words_are_numbered_by_frequency_and_then_in_alphabetical_order(folder):
    task = Wikitext103(folder)
    assert task.vocab == ["<eos>", "=", "cat", "sat", "the", ",", ".", "<unk>", "The", "a", "dog", "naïve", "title"]
    assert task.vocab_size == task.num_classes == len(task.vocab)


def test_every_word_and_every_end_of_a_line_is_a_token(folder):
    task = Wikitext103(folder)
    for split, text in TEXTS.items():
        words = [word for line in text.splitlines() for word in [*line.split(), "<eos>"]]
        assert [task.vocab[token] for token in task.splits[split]] == words
        assert isinstance(task.splits[split], np.memmap)
        assert task.data_info[split] == {"words": len(words)}
    assert next(task.stream("test", 1, 7)).targets.tolist() == [task.splits["test"][1:].tolist()]


def test_the_text_is_not_needed_once_it_is_tokenized(folder):
    before = Wikitext103(folder).splits["train"].tolist()
    for split in TEXTS:
        (folder / f"wiki.{split}.tokens").unlink()
    assert Wikitext103(folder).splits["train"].tolist() == before


def test_the_files_are_unpacked_from_their_archive(folder, monkeypatch):
    before = Wikitext103(folder).splits["train"].tolist()
    cache_folder = folder / "cache" / "wikitext103"
    for file in cache_folder.iterdir():
        file.unlink()
    with zipfile.ZipFile(cache_folder / "wikitext-103-v1.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in TEXTS.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    content = (cache_folder / "wikitext-103-v1.zip").read_bytes()
    monkeypatch.setattr(wikitext103, "ZIP_SIZE", len(content))
    monkeypatch.setattr(wikitext103, "ZIP_SHA256", hashlib.sha256(content).hexdigest())
    assert Wikitext103().splits["train"].tolist() == before


def test_the_text_comes_from_the_hub_first(folder, monkeypatch):
    before = {split: tokens.tolist() for split, tokens in Wikitext103(folder).splits.items()}
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(folder / "another"))
    monkeypatch.setattr("datasets.load_dataset", hub(TEXTS))
    monkeypatch.setattr(wikitext103, "download", None)
    assert {split: tokens.tolist() for split, tokens in Wikitext103().splits.items()} == before


def test_files_in_data_dir_are_used_and_nothing_is_downloaded(folder, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.setattr(wikitext103, "download", None)
    assert Wikitext103(folder).vocab_size == 13


def test_a_text_on_the_hub_with_another_number_of_words_is_not_used(folder, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(folder / "another"))
    monkeypatch.setattr("datasets.load_dataset", hub(TEXTS | {"valid": "one word too few"}))
    with pytest.raises(FileNotFoundError, match=r"wiki.valid.tokens is missing, and cannot download http"):
        Wikitext103()
    assert "wiki.valid.tokens" not in visible(folder / "another" / "wikitext103")


def test_without_a_network_the_error_says_what_is_missing_and_where_to_put_it(folder):
    (folder / "wiki.train.tokens").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Wikitext103(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}/wiki.train.tokens is missing, and cannot download http://127.0.0.1:1/")
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
        ("test", b" the zebra\n", r"test.tokens has 'zebra', which is not in the train split: delete it"),
    ],
)
def test_texts_that_are_not_the_published_ones_are_refused_by_name(folder, split, content, message):
    (folder / f"wiki.{split}.tokens").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Wikitext103(folder)
    assert f"{split}.int32" not in visible(folder / "cache" / "wikitext103")
