import pickle

import pytest

from expire_span.tasks import dialogue
from expire_span.tasks.dialogue import load_dialogue


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def dialogues(count):
    return [{"agents": [], "speech": [f"line {number} a", None, f"line {number} b"]} for number in range(count)]


def pickled(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: [{"speech": [bad]}]], ids=["bare", "deep"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, wrap):
    path = pickled(tmp_path / "light.pkl", wrap(Malicious(tmp_path / "was run")))
    with pytest.raises(ValueError, match=r"pkl is not a pickle of plain data, and is not run \(.*builtins.exec\)"):
        load_dialogue(path)
    assert not (tmp_path / "was run").exists()


def test_a_damaged_pickle_is_refused(tmp_path):
    path = tmp_path / "light.pkl"
    path.write_bytes(pickle.dumps(dialogues(3))[:-20])
    with pytest.raises(ValueError, match=r"light.pkl is not a pickle of plain data"):
        load_dialogue(path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold LIGHT's dialogues \(no 'speech'\)"):
        load_dialogue(pickled(tmp_path / "light.pkl", [{"text": "hello"}]))


def test_dialogues_are_not_divided_and_each_utterance_is_in_one_split(tmp_path):
    parts = load_dialogue(pickled(tmp_path / "light.pkl", dialogues(5000)))
    assert {split: len(part) for split, part in parts.items()} == {"train": 7000, "valid": 1000, "test": 2000}
    assert len({utterance for part in parts.values() for utterance in part}) == 10_000
    held_out = {int(utterance.split()[1]) for split in ("valid", "test") for utterance in parts[split]}
    assert min(held_out) >= 1368
    assert max(held_out) <= 4732


def test_lights_dialogues_are_downloaded_once_and_kept_as_utterances(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    archive = pickled(tmp_path / "downloaded.pkl", dialogues(2000))
    downloaded = []
    monkeypatch.setattr(dialogue, "download", lambda *arguments: downloaded.append(arguments) or archive)
    assert load_dialogue("light") == load_dialogue("light") == load_dialogue(archive)
    assert [url for url, *_ in downloaded] == [dialogue.URL]
