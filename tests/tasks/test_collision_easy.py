import numpy as np
import pytest
import torch

from expire_span.tasks.collision_easy import LABELS, CollisionEasy
from expire_span.tasks.stream import IGNORED


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))


def small(**changes):
    arguments = {"grid": 4, "timesteps": 1200, "evaluation_timesteps": 1200, "worlds": 4, "evaluation_worlds": 4}
    return CollisionEasy(**(arguments | changes))


def answers(fields, half):
    """(answer or IGNORED, timesteps back) of each timestep of one world, by its rule, step by step."""
    found, last = [], []
    for now, (x1, y1, x2, y2, question) in enumerate(fields):
        if (x1, y1) == (x2, y2):
            last = [(int(x1 >= half) + 2 * int(y1 >= half), now), *last[:2]]
        if len(last) < (3 if question else 1):
            found.append((IGNORED, 0))
        elif question:
            found.append((int(LABELS[last[0][0], last[1][0], last[2][0]]), now - last[2][1]))
        else:
            found.append((last[0][0], now - last[0][1]))
    return found


def join(batches):
    return [torch.cat(part, dim=1) for part in zip(*batches, strict=True) if part[0] is not None]


def test_answers_and_distances_are_those_of_going_through_the_tokens():
    task = small()
    tokens, targets, reach, distance = join(task.stream("test", 2, 50))
    for stream in range(2):
        moments = tokens[stream].reshape(-1, 5) - torch.as_tensor(task.first_tokens)
        for world in range(2):
            span = slice(world * 300, (world + 1) * 300)
            for step, (answer, ago) in enumerate(answers(moments[span].tolist(), half=2), start=span.start):
                assert targets[stream, 5 * step : 5 * step + 5].tolist() == [IGNORED] * 4 + [answer]
                assert distance[stream, 5 * step + 4] == 5 * ago
            assert reach[stream, 5 * span.start : 5 * span.stop].tolist() == list(range(1500))
    assert (targets != IGNORED).sum() > 600


def test_a_world_without_collisions_asks_nothing():
    task = small(grid=256, timesteps=4)
    assert (next(task.stream("train", 4, 10)).targets == IGNORED).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_questions_are_about_three_collisions_as_often_as_they_should(share):
    fields = small(mapping_questions=share).simulate(np.random.default_rng(0), 4, 20_000)["fields"]
    assert fields[..., 4].mean() == pytest.approx(share, abs=0.01)


def test_each_label_of_the_table_is_as_frequent_as_any_other():
    assert np.bincount(LABELS.ravel()).tolist() == [16] * 4


def test_the_label_depends_on_each_of_the_three_collisions():
    for axis in range(3):
        assert (np.roll(LABELS, 1, axis) != LABELS).any()


def test_merged_tokens_are_five_fields_of_a_timestep():
    task = small(merged=True)
    tokens = next(task.stream("train", 4, 300)).tokens
    assert task.vocabulary == 18
    assert [tokens[..., field].unique().tolist() for field in range(5)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17],
    ]  # fmt: skip


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match=r"task.mapping_questions is a share .* got 1.5"):
        small(mapping_questions=1.5)
    with pytest.raises(ValueError, match=r"block must be a multiple of the 5 tokens a timestep, got 16"):
        small().stream("train", 4, 16)
    with pytest.raises(ValueError, match=r"task.grid must be even"):
        small(grid=5)
