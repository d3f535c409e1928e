"""The rules are checked in the text alone, by a reader that knows nothing of how it is made."""

import json
import re
import time
from itertools import accumulate

import pytest
import torch

from expire_span.tasks.chatter import build_chatter
from expire_span.tasks.instruction import Instruction, World, split_words
from expire_span.tasks.light_world import build_map

PARTS = re.compile(
    r"you are the (?P<viewer>[^.]+) \."
    r"|you go towards the (?P<goes>[^.]+) \."
    r"|the (?P<here>[^.]+?) is here \."
    r"|the (?P<arrives>[^.]+?) arrives \."
    r"|the (?P<leaves>[^.]+?) leaves towards the (?P<to>[^.]+) \."
    r"|can you tell the (?P<target>[^.]+?) that the (?P<giver>[^.]+?) wants to see them \?"
    r'|you tell the (?P<told>[^."]+) " (?P<sender>[^."]+) wants to see you ! "'
    r'|(?P<speaker>you say|the (?P<says>[^.]+?) says) " (?P<utterance>[^"]*) "'
)


def join(blocks):
    """The blocks' tokens, targets, distances and answers, each (B, time)."""
    parts = ("tokens", "targets", "distance", "answer")
    return [torch.cat([getattr(block, part) for block in blocks], dim=1) for part in parts]


def text_of(task, tokens):
    return " ".join(task.words[token] for token in tokens.tolist())


def read(text):
    """The sentences of a text one after another, with the number of words before each; the last may be cut off."""
    place = words = 0
    while found := PARTS.match(text, place):
        yield found, words
        words += len(found[0].split())
        place = found.end() + 1
    assert len(text) - place < 200, f"not a sentence: {text[place : place + 200]}"


@pytest.fixture(scope="module")
def told():
    """A task with many instructions at a time, and what four of its worlds tell."""
    task = Instruction(distractors=10, seed=3)
    stream = task.stream("train", 4, 256)
    return task, join([next(stream) for _ in range(40)])


def test_every_target_is_the_next_word_and_none_is_unknown(told):
    _, (tokens, targets, *_) = told
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.min() > 0


def test_an_instruction_is_executed_once_and_as_soon_as_its_target_is_there(told):
    task, (tokens, *_) = told
    executed = 0
    for row in tokens:
        there, waiting, viewer = set(), {}, None
        for part, _ in read(text_of(task, row)):
            which = {name: value for name, value in part.groupdict().items() if value is not None}
            viewer = which.get("viewer", viewer)
            there = set() if "goes" in which else there | {which.get("here"), which.get("arrives")} - {None}
            assert viewer not in there
            if "leaves" in which:
                there.remove(which["leaves"])
            elif "target" in which:
                assert which["giver"] in there
                assert which["target"] not in {*waiting, *there, viewer}
                waiting[which["target"]] = which["giver"]
            elif "told" in which:
                assert which["told"] in there
                assert waiting.pop(which["told"]) == which["sender"]
                executed += 1
            elif "speaker" in which:
                assert there, "nobody talks alone"
                assert which.get("says") in {None, *there}
                assert not there & set(waiting), "an instruction comes before talk"
    assert executed > 50


@pytest.mark.parametrize(("waiting", "least", "most"), [(None, 3, 10), (1, 1, 1)])
def test_several_instructions_wait_at_once_but_no_more_than_are_let(waiting, least, most):
    task = Instruction(distractors=10, waiting=waiting)
    text = text_of(task, next(task.stream("train", 1, 4096)).tokens[0])
    changes = [{"giver": 1, "sender": -1}.get(part.lastgroup or "", 0) for part, _ in read(text)]
    assert least <= max(accumulate(changes)) <= most
    assert min(accumulate(changes)) == 0


def test_no_utterance_comes_again_within_fifty(told):
    task, (tokens, *_) = told
    for row in tokens:
        said = [part["utterance"] for part, _ in read(text_of(task, row)) if part["utterance"]]
        assert len(said) > 100
        assert all(utterance not in said[max(0, place - 49) : place] for place, utterance in enumerate(said))


def test_the_answer_is_the_executing_line_but_for_its_first_word_and_its_distance_is_that_of_the_names(told):
    task, (tokens, targets, distance, answer) = told
    for row in range(len(tokens)):
        said, expected, lengths = {}, torch.full_like(answer[row], -1), torch.zeros_like(distance[row])
        for part, place in read(text_of(task, tokens[row])):
            if part["target"]:
                said[part["target"]] = place + len(part[0].split(part["giver"])[0].split())
            if part["told"]:
                words = slice(place, place + len(part[0].split()) - 1)  # of the targets, which are a word ahead
                expected[words] = expected.max() + 1
                name = place + 5 + len(part["told"].split()) - 1
                lengths[words] = name - said[part["told"]]
                assert task.words[targets[row, place]] == "tell"
        known = slice(0, int((expected >= 0).nonzero()[-1]) + 1)  # the text may end within a line
        assert torch.equal(answer[row, known], expected[known])
        assert torch.equal(distance[row, known], lengths[known])


def test_distractors_between_instruction_and_execution_are_as_many_as_asked_for():
    for distractors in (2, 12):
        task = Instruction(distractors=distractors, rooms=5)
        between, said, count = [], {}, 0
        for row in next(task.stream("valid", 4, 20_000)).tokens:
            for part, _ in read(text_of(task, row)):
                count += part["utterance"] is not None
                if part["target"]:
                    said[part["target"]] = count
                if part["told"]:
                    between.append(count - said.pop(part["told"]))
            said.clear()
        assert sum(between) / len(between) == pytest.approx(distractors, rel=0.3)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_whatever_the_seed_there_is_as_much_talk_between_an_instruction_and_its_execution(seed):
    task = Instruction(100, seed=seed, rooms=2, agents=6, ask=1.0, waiting=1)
    world = World(task, "test", 0)
    for _ in range(6000):
        world.turns(0.0)
    assert world.executed > 2000
    assert world.talks_between / world.executed == pytest.approx(task.talks, rel=0.1)
    assert task.talks == Instruction(100, seed=0, rooms=2, agents=6, ask=1.0, waiting=1).talks


def test_splits_seeds_and_streams_differ():
    tasks = [Instruction(distractors=5, seed=seed) for seed in (0, 1)]
    firsts = [
        row
        for task in tasks
        for split in ("train", "valid", "test")
        for row in next(task.stream(split, 2, 200)).tokens
    ]
    for number, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[number + 1 :])


def test_a_stream_depends_on_its_number_not_on_the_batch_or_the_block():
    task = Instruction(distractors=5)
    wide, narrow = task.stream("valid", 3, 60), task.stream("valid", 2, 20)
    assert torch.equal(next(wide).tokens[:2], torch.cat([next(narrow).tokens for _ in range(3)], dim=1))


def test_a_saved_stream_goes_on_where_it_was_saved(tmp_path):
    task = Instruction(distractors=30, first_distractors=1)
    stream = task.stream("train", 3, 50)
    for _ in range(20):
        next(stream)
    task.feedback(1.0)
    torch.save((stream.state_dict(), task.state_dict()), tmp_path / "saved.pt")
    further = [next(stream) for _ in range(30)]
    again = Instruction(distractors=30, first_distractors=1)
    resumed = again.stream("train", 3, 50)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.stage == task.stage
    for expected, found in zip(further, resumed, strict=False):
        for one, other in zip(expected, found, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_distractors_grow_by_half_while_the_bar_is_passed_and_not_beyond_their_number():
    task = Instruction(distractors=5, first_distractors=2, bar=0.8)
    stages = []
    for accuracy in (0.8, 0.9, float("nan"), 0.9, 1.0):
        task.feedback(accuracy)
        stages.append(task.stage)
    assert stages == [2, 3, 3, 4.5, 5]


def test_evaluation_ends_after_its_words_in_whole_blocks():
    batches = list(Instruction(distractors=5, evaluation_words=1000).stream("test", 4, 40))
    assert len(batches) == 7


def test_a_block_is_made_in_less_than_two_milliseconds():
    stream = Instruction(distractors=20, first_distractors=0.5, waiting=1, rooms=2).stream("train", 16, 64)
    next(stream)
    began = time.process_time()
    for _ in range(100):
        next(stream)
    assert (time.process_time() - began) / 100 < 2e-3


def node(name, *exits):
    return {"name": name, "neighbors": {exit: {} for exit in exits}}


def world():
    """A map in LIGHT's format: two connected rooms, one beyond reach, and agents two of which have one name."""
    nodes = {"hall_1": node("Hall", "attic_2"), "attic_2": node("Attic", "hall_1"), "islet_3": node("Islet", "islet_3")}
    people = {"cook_1": node("Cook"), "cook_2": node("cook"), "owl_3": node("Wise owl"), "fox_4": node("fox")}
    return {"rooms": [*nodes], "agents": [*people], "nodes": nodes | people}


def saved(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_map_of_lights_is_read_with_its_connected_rooms_and_one_agent_a_name(tmp_path):
    assert build_map(saved(tmp_path / "world.json", world())) == (
        ["hall", "attic"],
        [[1], [0]],
        ["cook", "wise owl", "fox"],
    )


def test_a_file_of_utterances_is_what_is_said(tmp_path):
    chatter = [f"This is utterance {number}!" for number in range(60)]
    task = Instruction(distractors=9, chatter=saved(tmp_path / "said.json", chatter), agents=3)
    text = text_of(task, next(task.stream("test", 1, 2000)).tokens[0])
    said = {part["utterance"] for part, _ in read(text) if part["utterance"]}
    assert said
    assert said <= {" ".join(split_words(utterance)) for utterance in chatter}


def test_a_word_that_training_does_not_have_is_the_unknown_one(tmp_path, monkeypatch):
    parts = {split: [f"{split} {number}" for number in range(60)] for split in ("train", "valid", "test")}
    monkeypatch.setattr("expire_span.tasks.instruction.build_chatter", lambda source: parts)
    task = Instruction(distractors=9)
    assert "valid" not in task.words
    text = text_of(task, next(task.stream("valid", 1, 500)).tokens[0])
    assert " <unknown> " in text
    assert "<unknown>" not in text_of(task, next(task.stream("train", 1, 500)).tokens[0])


def without(key):
    content = world()
    del content["nodes"]["attic_2"][key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("neighbors"), "has no key 'neighbors'"),
        (without("name"), "has no key 'name'"),
        ({"nodes": {}}, "has no key 'rooms'"),
        (world() | {"rooms": []}, "has no rooms"),
        (world() | {"nodes": world()["nodes"] | {"attic_2": node("Attic")}}, "room 'attic' has no exits"),
        (world() | {"nodes": world()["nodes"] | {"attic_2": node("Attic", "moon_9")}}, "leads to 'moon_9'"),
        (world() | {"agents": ["cook_1", "owl_3"]}, "has 2 agents with task.agents=None, at least 3 are needed"),
        ([], "is not a map of LIGHT's"),
    ],
)
def test_what_is_not_a_map_is_refused_in_one_line(tmp_path, content, message):
    path = saved(tmp_path / "world.json", content)
    with pytest.raises(ValueError, match=rf"\Atask.world={re.escape(str(path))}[^\n]*{message}[^\n]*\Z"):
        Instruction(distractors=5, world=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distractors": 0}, "task.first_distractors must be positive"),
        ({"first_distractors": 6}, "task.first_distractors must be .* at most task.distractors=5, got 6"),
        ({"ask": 0.0}, "task.ask is a chance and must be above 0 and at most 1, got 0.0"),
        ({"waiting": 0}, "task.waiting must be at least 1 instruction, got 0"),
        ({"rooms": 1}, "room 'market square' has no exits"),
        ({"agents": 2}, "has 2 agents with task.agents=2"),
        ({"evaluation_words": 0}, "task.evaluation_words must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Instruction(**{"distractors": 5, **arguments})


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "has 0 different utterances in train"), (["Hello."] * 60, "has 1 different"), ({"a": 1}, "list of strings")],
)
def test_too_few_utterances_or_none_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Instruction(distractors=5, chatter=saved(tmp_path / "said.json", content))


def test_missing_files_are_named(tmp_path):
    for key in ("world", "chatter"):
        with pytest.raises(FileNotFoundError, match=f"task.{key}=.*nowhere.json does not exist"):
            Instruction(distractors=5, **{key: tmp_path / "nowhere.json"})


def test_ten_thousand_sentences_are_built_in():
    assert len(set(build_chatter(None)["train"])) > 10_000
