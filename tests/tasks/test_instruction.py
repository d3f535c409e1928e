"""Check the rules in the text alone, with a parser that knows nothing of the generator."""

import json
import re
import time
from itertools import accumulate

import pytest
import torch

from expire_span.tasks.dialogue import load_dialogue
from expire_span.tasks.instruction import TRIAL_ROUNDS, Instruction, SilentWorld, split_words
from expire_span.tasks.instruction_map import load_map

PARTS = re.compile(
    r"you are the (?P<viewer>[^.]+) \."
    r"|you go towards the (?P<goes>[^.]+) \."
    r"|the (?P<here>[^.]+?) is here \."
    r"|the (?P<arrives>[^.]+?) arrives \."
    r"|the (?P<leaves>[^.]+?) leaves towards the (?P<to>[^.]+) \."
    r"|can you tell the (?P<target>[^.]+?) that the (?P<giver>[^.]+?) wants to see them \?"
    r'|you tell the (?P<executed_target>[^."]+) " (?P<message_giver>[^."]+) wants to see you ! "'
    r'|(?P<speaker>you say|the (?P<says>[^.]+?) says) " (?P<utterance>[^"]*) "'
)


def join(blocks):
    """The blocks' tokens, targets, distances and answers, each (B, time)."""
    parts = ("tokens", "targets", "answer_distance", "answer_id")
    return [torch.cat([getattr(block, part) for block in blocks], dim=1) for part in parts]


def text_of(task, tokens):
    return " ".join(task.vocab[token] for token in tokens.tolist())


def read(text):
    """The sentences of a text one after another, with the number of words before each; the last may be cut off."""
    position = words = 0
    while match := PARTS.match(text, position):
        yield match, words
        words += len(match[0].split())
        position = match.end() + 1
    assert len(text) - position < 200, f"not a sentence: {text[position : position + 200]}"


@pytest.fixture(scope="module")
def generated_text():
    """A task with many instructions at a time, and the text of four of its worlds."""
    task = Instruction(distractors=10, seed=3)
    stream = task.stream("train", 4, 256)
    return task, join([next(stream) for _ in range(40)])


def test_every_target_is_the_next_word_and_none_is_unknown(generated_text):
    _, (tokens, targets, *_) = generated_text
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.min() > 0


def test_an_instruction_is_executed_once_and_as_soon_as_its_target_is_there(generated_text):
    task, (tokens, *_) = generated_text
    executed = 0
    for row in tokens:
        present, pending, viewer = set(), {}, None
        for part, _ in read(text_of(task, row)):
            which = {name: value for name, value in part.groupdict().items() if value is not None}
            viewer = which.get("viewer", viewer)
            present = set() if "goes" in which else present | {which.get("here"), which.get("arrives")} - {None}
            assert viewer not in present
            if "leaves" in which:
                present.remove(which["leaves"])
            elif "target" in which:
                assert which["giver"] in present
                assert which["target"] not in {*pending, *present, viewer}
                pending[which["target"]] = which["giver"]
            elif "executed_target" in which:
                assert which["executed_target"] in present
                assert pending.pop(which["executed_target"]) == which["message_giver"]
                executed += 1
            elif "speaker" in which:
                assert present, "nobody talks alone"
                assert which.get("says") in {None, *present}
                assert not present & set(pending), "an instruction comes before talk"
    assert executed > 50


@pytest.mark.parametrize(("max_pending", "least", "most"), [(None, 3, 10), (1, 1, 1)])
def test_several_instructions_are_pending_at_once_but_never_more_than_max_pending(max_pending, least, most):
    task = Instruction(distractors=10, max_pending=max_pending)
    text = text_of(task, next(task.stream("train", 1, 4096)).tokens[0])
    changes = [{"giver": 1, "message_giver": -1}.get(part.lastgroup or "", 0) for part, _ in read(text)]
    assert least <= max(accumulate(changes)) <= most
    assert min(accumulate(changes)) == 0


def test_no_utterance_comes_again_within_fifty(generated_text):
    task, (tokens, *_) = generated_text
    for row in tokens:
        utterances = [part["utterance"] for part, _ in read(text_of(task, row)) if part["utterance"]]
        assert len(utterances) > 100
        assert all(
            utterance not in utterances[max(0, position - 49) : position]
            for position, utterance in enumerate(utterances)
        )


def test_the_answer_is_the_executing_line_but_for_its_first_word_and_its_distance_that_of_the_names(generated_text):
    task, (tokens, targets, distance, answer) = generated_text
    for row in range(len(tokens)):
        instructed_at, expected, lengths = {}, torch.full_like(answer[row], -1), torch.zeros_like(distance[row])
        for part, position in read(text_of(task, tokens[row])):
            if part["target"]:
                instructed_at[part["target"]] = position + len(part[0].split(part["giver"])[0].split())
            if part["executed_target"]:
                words = slice(position, position + len(part[0].split()) - 1)  # of the targets, which are a word ahead
                expected[words] = expected.max() + 1
                name = position + 5 + len(part["executed_target"].split()) - 1
                lengths[words] = name - instructed_at[part["executed_target"]]
                assert task.vocab[targets[row, position]] == "tell"
        known = slice(0, int((expected >= 0).nonzero()[-1]) + 1)  # the text may end within a line
        assert torch.equal(answer[row, known], expected[known])
        assert torch.equal(distance[row, known], lengths[known])


def test_distractors_between_instruction_and_execution_are_as_many_as_configured():
    for distractors in (2, 12):
        task = Instruction(distractors=distractors, num_rooms=5)
        between, instructed_at, count = [], {}, 0
        for row in next(task.stream("valid", 4, 20_000)).tokens:
            for part, _ in read(text_of(task, row)):
                count += part["utterance"] is not None
                if part["target"]:
                    instructed_at[part["target"]] = count
                if part["executed_target"]:
                    between.append(count - instructed_at.pop(part["executed_target"]))
            instructed_at.clear()
        assert sum(between) / len(between) == pytest.approx(distractors, rel=0.3)


MINI = {"num_rooms": 2, "num_agents": 6, "instruction_prob": 1.0, "max_pending": 1}


@pytest.mark.parametrize(("rules", "talks"), [({}, 8.384), (MINI, 1.2004)])  # means of nine long trials
def test_talk_is_calibrated_within_two_percent_for_every_seed(rules, talks):
    for seed in (0, 5):
        assert Instruction(100, seed=seed, **rules).talks_per_instruction == pytest.approx(talks, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, MINI, {"num_rooms": 5}])
def test_the_mean_number_of_distractors_over_seeds_is_that_of_the_config_within_two_percent(rules):
    between = executed = 0
    for seed in range(1, 9):
        task = Instruction(100, seed=seed, **rules)
        world = SilentWorld(task, "test", 0)
        for _ in range(TRIAL_ROUNDS * len(task.map.agents)):
            world.play_round(0.0)
        between, executed = between + world.talks_between, executed + world.num_executed
    assert 100 * between / executed / task.talks_per_instruction == pytest.approx(100, rel=0.02)


def test_splits_seeds_and_streams_differ():
    tasks = [Instruction(distractors=5, seed=seed) for seed in (0, 1)]
    firsts = [
        row for task in tasks for split in ("train", "valid", "test") for row in next(task.stream(split, 2, 200)).tokens
    ]
    for number, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[number + 1 :])


def test_a_stream_depends_on_its_number_not_on_the_batch_or_the_block():
    task = Instruction(distractors=5)
    wide, narrow = task.stream("valid", 3, 60), task.stream("valid", 2, 20)
    assert torch.equal(next(wide).tokens[:2], torch.cat([next(narrow).tokens for _ in range(3)], dim=1))


def test_a_saved_stream_resumes_where_it_was_saved(tmp_path):
    task = Instruction(distractors=30, initial_distractors=1)
    stream = task.stream("train", 3, 50)
    for _ in range(20):
        next(stream)
    task.update_curriculum(1.0)
    torch.save((stream.state_dict(), task.state_dict()), tmp_path / "saved.pt")
    expected_batches = [next(stream) for _ in range(30)]
    again = Instruction(distractors=30, initial_distractors=1)
    resumed = again.stream("train", 3, 50)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert again.curriculum_stage == task.curriculum_stage
    for expected, actual in zip(expected_batches, resumed, strict=False):
        for one, other in zip(expected, actual, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_distractors_grow_by_half_above_the_threshold_and_not_beyond_their_number():
    task = Instruction(distractors=5, initial_distractors=2, curriculum_threshold=0.8)
    stages = []
    for accuracy in (0.8, 0.9, float("nan"), 0.9, 1.0):
        task.update_curriculum(accuracy)
        stages.append(task.curriculum_stage)
    assert stages == [2, 3, 3, 4.5, 5]


def test_evaluation_ends_after_its_words_in_whole_blocks():
    batches = list(Instruction(distractors=5, eval_tokens=1000).stream("test", 4, 40))
    assert len(batches) == 7


def test_a_block_is_generated_in_less_than_two_milliseconds():
    stream = Instruction(distractors=20, initial_distractors=0.5, max_pending=1, num_rooms=2).stream("train", 16, 64)
    next(stream)
    began = time.process_time()
    for _ in range(100):
        next(stream)
    assert (time.process_time() - began) / 100 < 2e-3


def node(name, *exits):
    return {"name": name, "neighbors": {exit: {} for exit in exits}}


def light_map():
    """A map in LIGHT's format: two connected rooms, one beyond reach, and agents two of which have one name."""
    nodes = {"hall_1": node("Hall", "attic_2"), "attic_2": node("Attic", "hall_1"), "islet_3": node("Islet", "islet_3")}
    people = {"cook_1": node("Cook"), "cook_2": node("cook"), "owl_3": node("Wise owl"), "fox_4": node("fox")}
    return {"rooms": [*nodes], "agents": [*people], "nodes": nodes | people}


def saved(path, content):
    path.write_text(json.dumps(content))
    return path


def test_a_map_of_lights_is_read_with_its_connected_rooms_and_one_agent_a_name(tmp_path):
    assert load_map(saved(tmp_path / "map.json", light_map())) == (
        ["hall", "attic"],
        [[1], [0]],
        ["cook", "wise owl", "fox"],
    )


def test_agents_say_the_utterances_of_a_file(tmp_path):
    utterances = [f"This is utterance {number}!" for number in range(60)]
    task = Instruction(distractors=9, dialogue=saved(tmp_path / "utterances.json", utterances), num_agents=3)
    text = text_of(task, next(task.stream("test", 1, 2000)).tokens[0])
    spoken = {part["utterance"] for part, _ in read(text) if part["utterance"]}
    assert spoken
    assert spoken <= {" ".join(split_words(utterance)) for utterance in utterances}


def test_a_word_that_is_not_in_the_training_texts_is_unknown(tmp_path, monkeypatch):
    parts = {split: [f"{split} {number}" for number in range(60)] for split in ("train", "valid", "test")}
    monkeypatch.setattr("expire_span.tasks.instruction.load_dialogue", lambda source: parts)
    task = Instruction(distractors=9)
    assert "valid" not in task.vocab
    text = text_of(task, next(task.stream("valid", 1, 500)).tokens[0])
    assert " <unknown> " in text
    assert "<unknown>" not in text_of(task, next(task.stream("train", 1, 500)).tokens[0])


def without(key):
    content = light_map()
    del content["nodes"]["attic_2"][key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without("neighbors"), "has no key 'neighbors'"),
        (without("name"), "has no key 'name'"),
        ({"nodes": {}}, "has no key 'rooms'"),
        (light_map() | {"rooms": []}, "has no rooms"),
        (light_map() | {"nodes": light_map()["nodes"] | {"attic_2": node("Attic")}}, "room 'attic' has no exits"),
        (light_map() | {"nodes": light_map()["nodes"] | {"attic_2": node("Attic", "moon_9")}}, "leads to 'moon_9'"),
        (
            light_map() | {"agents": ["cook_1", "owl_3"]},
            "has 2 agents with task.num_agents=None, at least 3 are needed",
        ),
        ([], "is not a map of LIGHT's"),
    ],
)
def test_a_file_that_is_not_a_map_is_refused_in_one_line(tmp_path, content, message):
    path = saved(tmp_path / "map.json", content)
    with pytest.raises(ValueError, match=rf"\Atask.map_path={re.escape(str(path))}[^\n]*{message}[^\n]*\Z"):
        Instruction(distractors=5, map_path=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distractors": 0}, "task.initial_distractors must be positive"),
        ({"initial_distractors": 6}, "task.initial_distractors must be .* at most task.distractors=5, got 6"),
        ({"instruction_prob": 0.0}, "task.instruction_prob must be above 0 and at most 1, got 0.0"),
        ({"max_pending": 0}, "task.max_pending must be at least 1 instruction, got 0"),
        ({"num_rooms": 1}, "room 'market square' has no exits"),
        ({"num_rooms": -1}, "task.num_rooms must be at least 1, got -1; for all use null"),
        ({"num_agents": -1}, "task.num_agents must be at least 1, got -1"),
        ({"num_agents": 2}, "has 2 agents with task.num_agents=2"),
        ({"eval_tokens": 0}, "task.eval_tokens must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Instruction(**{"distractors": 5, **arguments})


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "has 0 different utterances in train"), (["Hello."] * 60, "has 1 different"), ({"a": 1}, "list of strings")],
)
def test_too_few_utterances_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        Instruction(distractors=5, dialogue=saved(tmp_path / "utterances.json", content))


def test_missing_files_are_named(tmp_path):
    for key in ("map_path", "dialogue"):
        with pytest.raises(FileNotFoundError, match=f"task.{key}=.*nowhere.json does not exist"):
            Instruction(distractors=5, **{key: tmp_path / "nowhere.json"})


def test_ten_thousand_sentences_are_built_in():
    assert len(set(load_dialogue(None)["train"])) > 10_000
