import numpy as np
import pytest
import torch

from expire_span.tasks.collision import Collision
from expire_span.tasks.stream import IGNORED


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    return tmp_path


def small(**changes):
    arguments = {"grid": 4, "colours": 3, "timesteps": 1200, "evaluation_timesteps": 1200, "worlds": 4}
    return Collision(**(arguments | {"evaluation_worlds": 4} | changes))


def answers(fields, half):
    """(quadrant or None, timesteps back) of each timestep of one world, by its rule, step by step."""
    found = []
    for now, (*_, first, second) in enumerate(fields):
        for then in range(now, -1, -1):
            x1, y1, x2, y2, colour1, colour2, *_ = fields[then]
            if (x1, y1) == (x2, y2) and (colour1, colour2) == (first, second):
                found.append(((x1 >= half) + 2 * (y1 >= half), now - then))
                break
        else:
            found.append((None, 0))
    return found


def join(batches):
    return [torch.cat(part, dim=1) for part in zip(*batches, strict=True) if part[0] is not None]


def test_answers_and_distances_are_those_of_a_search_back_through_the_tokens():
    task = small(colours=2, grid=6)
    tokens, targets, reach, distance = join(task.stream("test", 2, 24))
    asked = 0
    for stream in range(2):
        moments = tokens[stream].reshape(-1, 8) - torch.as_tensor(task.first_tokens)
        for world in range(2):
            span = slice(world * 300, (world + 1) * 300)
            for step, (quadrant, ago) in enumerate(answers(moments[span].tolist(), half=3), start=span.start):
                *before, last = targets[stream, 8 * step : 8 * step + 8].tolist()
                assert before == [IGNORED] * 7
                assert last == (IGNORED if quadrant is None else quadrant)
                assert distance[stream, 8 * step + 7] == 8 * ago
                asked += quadrant is not None
            assert reach[stream, 8 * span.start : 8 * span.stop].tolist() == list(range(2400))
    assert asked > 600


def test_a_particle_flies_as_it_does_step_by_step():
    ours = small(grid=8).fly(np.random.default_rng(5), 1, 2000)[0]
    generator = np.random.default_rng(5)
    place = generator.random((1, 2)) * 8
    velocity = generator.normal(0, 0.5, (1, 2))
    for step in range(2000):
        assert ours[step].tolist() == place[0].astype(int).tolist(), f"step {step}"
        while ((place + velocity < 0) | (place + velocity >= 8)).any():
            velocity = generator.normal(0, 0.5, (1, 2))
        place = place + velocity


def test_colours_change_and_questions_are_drawn_as_often_as_they_should():
    task = Collision(grid=4, colours=3, colour_change=0.3, last_collision_questions=0.4)
    moments = task.simulate(np.random.default_rng(0), 4, 20_000)
    fields = moments["fields"].astype(int)
    changed = (fields[:, 1:, 4:6] != fields[:, :-1, 4:6]).mean()
    assert changed == pytest.approx(0.3 * 2 / 3, abs=0.01)
    met = (fields[..., 0:2] == fields[..., 2:4]).all(-1)
    last = np.maximum.accumulate(np.where(met, np.arange(20_000), 0), axis=1)
    colours = np.take_along_axis(fields[..., 4:6], last[..., None], axis=1)
    about_last = (fields[..., 6:8] == colours).all(-1).mean()
    assert about_last == pytest.approx(0.4 + 0.6 / 9, abs=0.01)


def test_a_merged_timestep_is_asked_the_question_of_the_one_before():
    merged = join(small(merged=True).stream("valid", 4, 10))
    tokens, targets, reach, distance = (part.unflatten(1, (-1, 8)) for part in join(small().stream("valid", 4, 80)))
    assert torch.equal(merged[0][..., :6], tokens[..., :6])
    assert torch.equal(merged[0][:, 1:, 6:], tokens[:, :-1, 6:])
    assert (merged[1][:, 0] == IGNORED).all()
    assert torch.equal(merged[1][:, 1:], targets[:, :-1, 7])
    assert torch.equal(merged[2] * 8 + 7, reach[..., 7])
    assert torch.equal((merged[3][:, 1:] - 1) * 8, distance[:, :-1, 7])


def test_every_field_has_tokens_of_its_own():
    task = small(merged=True)
    tokens = next(task.stream("train", 4, 300)).tokens
    ends = np.cumsum([4, 4, 4, 4, 3, 3, 3, 3])
    assert task.vocabulary == ends[-1]
    for field, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert tokens[..., field].unique().tolist() == list(range(first, end))


def test_evaluation_asks_each_timestep_once_and_training_begins_again():
    task = small(merged=True)
    moments = task.moments("test")
    targets = join(task.stream("test", 2, 7))[1]  # 86 blocks of 7 for 600 timesteps: 2 too many
    assert targets.shape == (2, 602)
    assert (targets != IGNORED).sum() == (moments["answer"][:, :-1] >= 0).sum()  # merged, a world's last is not asked
    train = task.stream("train", 2, 7)
    rounds = join(next(train) for _ in range(200))
    for part in rounds:
        assert torch.equal(part[:, 600:1200], part[:, :600])


def test_a_stream_does_not_reach_from_one_world_into_another():
    reach = join(small(merged=True).stream("valid", 2, 30))[2]
    assert reach.tolist() == [[*range(300), *range(300)]] * 2


def test_a_saved_stream_goes_on_where_it_was_saved():
    stream, resumed = (small().stream("train", 2, 80) for _ in range(2))
    for _ in range(50):
        next(stream)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(40):
        for one, other in zip(next(stream), next(resumed), strict=True):
            assert one is other is None or torch.equal(one, other)


def test_splits_and_seeds_differ_and_the_same_seed_gives_the_same(monkeypatch, tmp_path):
    firsts = [small(seed=seed).moments(split)["fields"] for seed in (0, 1) for split in ("train", "valid", "test")]
    for i, one in enumerate(firsts):
        assert not any((one == other).all() for other in firsts[i + 1 :])
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    assert (small().moments("train")["fields"] == firsts[0]).all()


def test_worlds_are_made_once_and_read_from_disk(cache, monkeypatch):
    first = small().moments("train")
    assert isinstance(first, np.memmap)
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == [".npy"]
    monkeypatch.setattr(Collision, "simulate", None)
    assert (small(merged=True).moments("train") == first).all()


@pytest.mark.parametrize(
    ("arguments", "batch", "block", "message"),
    [
        ({}, 3, 8, r"task.worlds must be a multiple of its batch=3, got 4"),
        ({}, 2, 12, r"block must be a multiple of the 8 tokens a timestep, got 12"),
        ({"grid": 5}, 2, 8, r"task.grid must be even"),
        ({"colours": 16}, 2, 8, r"task.colours must be from 1 to 15, got 16"),
        ({"colour_change": 1.5}, 2, 8, r"task.colour_change .* got 1.5"),
        ({"last_collision_questions": -1}, 2, 8, r"task.last_collision_questions .* got -1"),
        ({"speed": 0}, 2, 8, r"task.speed must be above 0"),
        ({"timesteps": 3}, 2, 8, r"task.worlds must be from 1 to task.timesteps=3, got 4"),
        ({"evaluation_worlds": 0}, 2, 8, r"task.evaluation_worlds must be .*, got 0"),
        ({"seed": -1}, 2, 8, r"seed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, batch, block, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments).stream("train", batch, block)
