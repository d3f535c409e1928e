import numpy as np
import pytest
import torch

from expire_span.tasks.base import IGNORE_INDEX
from expire_span.tasks.collision_easy import LABELS, CollisionEasy


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))


def small(**changes):
    arguments = {"grid_size": 4, "timesteps": 1200, "eval_timesteps": 1200, "num_simulations": 4, "eval_simulations": 4}
    return CollisionEasy(**(arguments | changes))


def answers(fields, half):
    """(answer or IGNORE_INDEX, timesteps back) of each timestep of one simulation, by the rule, step by step."""
    results, last = [], []
    for now, (x1, y1, x2, y2, question) in enumerate(fields):
        if (x1, y1) == (x2, y2):
            last = [(int(x1 >= half) + 2 * int(y1 >= half), now), *last[:2]]
        if len(last) < (3 if question else 1):
            results.append((IGNORE_INDEX, 0))
        elif question:
            results.append((int(LABELS[last[0][0], last[1][0], last[2][0]]), now - last[2][1]))
        else:
            results.append((last[0][0], now - last[0][1]))
    return results


def join(batches):
    return [torch.cat(part, dim=1) for part in zip(*batches, strict=True) if part[0] is not None]


def test_answers_and_distances_equal_those_of_a_walk_through_the_tokens():
    task = small()
    tokens, targets, reach, distance = join(task.stream("test", 2, 50))
    for stream in range(2):
        records = tokens[stream].reshape(-1, 5) - torch.as_tensor(task.first_tokens)
        for simulation in range(2):
            span = slice(simulation * 300, (simulation + 1) * 300)
            for step, (answer, ago) in enumerate(answers(records[span].tolist(), half=2), start=span.start):
                assert targets[stream, 5 * step : 5 * step + 5].tolist() == [IGNORE_INDEX] * 4 + [answer]
                assert distance[stream, 5 * step + 4] == 5 * ago
            assert reach[stream, 5 * span.start : 5 * span.stop].tolist() == list(range(1500))
    assert (targets != IGNORE_INDEX).sum() > 600


def test_nothing_is_scored_without_collisions():
    task = small(grid_size=256, timesteps=4)
    assert (next(task.stream("train", 4, 10)).targets == IGNORE_INDEX).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_three_collisions_are_asked_about_as_often_as_configured(share):
    fields = small(mapping_question_fraction=share).simulate(np.random.default_rng(0), 4, 20_000)["fields"]
    assert fields[..., 4].mean() == pytest.approx(share, abs=0.01)


def test_all_labels_of_the_table_are_equally_frequent():
    assert np.bincount(LABELS.ravel()).tolist() == [16] * 4


def test_the_label_depends_on_each_of_the_three_collisions():
    for axis in range(3):
        assert (np.roll(LABELS, 1, axis) != LABELS).any()


def test_merged_tokens_are_five_fields_of_a_timestep():
    task = small(merge_fields=True)
    tokens = next(task.stream("train", 4, 300)).tokens
    assert task.vocab_size == 18
    assert [tokens[..., field].unique().tolist() for field in range(5)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17],
    ]  # fmt: skip


def test_invalid_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"task.mapping_question_fraction must be from 0 to 1, got 1.5"):
        small(mapping_question_fraction=1.5)
    with pytest.raises(ValueError, match=r"block_size must be a multiple of the 5 tokens of a timestep, got 16"):
        small().stream("train", 4, 16)
    with pytest.raises(ValueError, match=r"task.grid_size must be even"):
        small(grid_size=5)
