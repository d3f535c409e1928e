import numpy as np
import pytest
import torch

from expire_span.tasks.base import IGNORE_INDEX
from expire_span.tasks.collision import Collision


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    return tmp_path


def small(**changes):
    arguments = {"grid_size": 4, "num_colors": 3, "timesteps": 1200, "eval_timesteps": 1200, "num_simulations": 4}
    return Collision(**(arguments | {"eval_simulations": 4} | changes))


def answers(fields, half):
    """(quadrant or None, timesteps back) of each timestep of one simulation, by the rule, step by step."""
    results = []
    for now, (*_, first, second) in enumerate(fields):
        for then in range(now, -1, -1):
            x1, y1, x2, y2, color1, color2, *_ = fields[then]
            if (x1, y1) == (x2, y2) and (color1, color2) == (first, second):
                results.append(((x1 >= half) + 2 * (y1 >= half), now - then))
                break
        else:
            results.append((None, 0))
    return results


def join(batches):
    return [torch.cat(part, dim=1) for part in zip(*batches, strict=True) if part[0] is not None]


def test_answers_and_distances_equal_those_of_a_search_back_through_the_tokens():
    task = small(num_colors=2, grid_size=6)
    tokens, targets, reach, distance = join(task.stream("test", 2, 24))
    scored = 0
    for stream in range(2):
        records = tokens[stream].reshape(-1, 8) - torch.as_tensor(task.first_tokens)
        for simulation in range(2):
            span = slice(simulation * 300, (simulation + 1) * 300)
            for step, (quadrant, ago) in enumerate(answers(records[span].tolist(), half=3), start=span.start):
                *before, last = targets[stream, 8 * step : 8 * step + 8].tolist()
                assert before == [IGNORE_INDEX] * 7
                assert last == (IGNORE_INDEX if quadrant is None else quadrant)
                assert distance[stream, 8 * step + 7] == 8 * ago
                scored += quadrant is not None
            assert reach[stream, 8 * span.start : 8 * span.stop].tolist() == list(range(2400))
    assert scored > 600


def test_motion_equals_that_of_one_particle_step_by_step():
    cells = small(grid_size=8).simulate_motion(np.random.default_rng(5), 1, 2000)[0]
    generator = np.random.default_rng(5)
    position = generator.random((1, 2)) * 8
    velocity = generator.normal(0, 0.5, (1, 2))
    for step in range(2000):
        assert cells[step].tolist() == position[0].astype(int).tolist(), f"step {step}"
        while ((position + velocity < 0) | (position + velocity >= 8)).any():
            velocity = generator.normal(0, 0.5, (1, 2))
        position = position + velocity


def test_colors_change_and_last_collisions_are_asked_as_often_as_configured():
    task = Collision(grid_size=4, num_colors=3, color_change_prob=0.3, last_collision_question_fraction=0.4)
    records = task.simulate(np.random.default_rng(0), 4, 20_000)
    fields = records["fields"].astype(int)
    changed = (fields[:, 1:, 4:6] != fields[:, :-1, 4:6]).mean()
    assert changed == pytest.approx(0.3 * 2 / 3, abs=0.01)
    met = (fields[..., 0:2] == fields[..., 2:4]).all(-1)
    last = np.maximum.accumulate(np.where(met, np.arange(20_000), 0), axis=1)
    colors = np.take_along_axis(fields[..., 4:6], last[..., None], axis=1)
    about_last = (fields[..., 6:8] == colors).all(-1).mean()
    assert about_last == pytest.approx(0.4 + 0.6 / 9, abs=0.01)


def test_a_merged_timestep_has_the_question_of_the_timestep_before():
    merged = join(small(merge_fields=True).stream("valid", 4, 10))
    tokens, targets, reach, distance = (part.unflatten(1, (-1, 8)) for part in join(small().stream("valid", 4, 80)))
    assert torch.equal(merged[0][..., :6], tokens[..., :6])
    assert torch.equal(merged[0][:, 1:, 6:], tokens[:, :-1, 6:])
    assert (merged[1][:, 0] == IGNORE_INDEX).all()
    assert torch.equal(merged[1][:, 1:], targets[:, :-1, 7])
    assert torch.equal(merged[2] * 8 + 7, reach[..., 7])
    assert torch.equal((merged[3][:, 1:] - 1) * 8, distance[:, :-1, 7])


def test_every_field_has_tokens_of_its_own():
    task = small(merge_fields=True)
    tokens = next(task.stream("train", 4, 300)).tokens
    ends = np.cumsum([4, 4, 4, 4, 3, 3, 3, 3])
    assert task.vocab_size == ends[-1]
    for field, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert tokens[..., field].unique().tolist() == list(range(first, end))


def test_evaluation_scores_each_timestep_once_and_training_repeats():
    task = small(merge_fields=True)
    records = task.records("test")
    targets = join(task.stream("test", 2, 7))[1]  # 86 blocks of 7 for 600 timesteps: 2 too many
    assert targets.shape == (2, 602)
    num_answers = (records["answer"][:, :-1] >= 0).sum()  # merged, the last question of a simulation is not asked
    assert (targets != IGNORE_INDEX).sum() == num_answers
    train = task.stream("train", 2, 7)
    rounds = join(next(train) for _ in range(200))
    for part in rounds:
        assert torch.equal(part[:, 600:1200], part[:, :600])


def test_reach_ends_where_a_simulation_begins():
    reach = join(small(merge_fields=True).stream("valid", 2, 30))[2]
    assert reach.tolist() == [[*range(300), *range(300)]] * 2


def test_a_saved_stream_resumes_where_it_was_saved():
    stream, resumed = (small().stream("train", 2, 80) for _ in range(2))
    for _ in range(50):
        next(stream)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(40):
        for expected, actual in zip(next(stream), next(resumed), strict=True):
            assert expected is actual is None or torch.equal(expected, actual)


def test_splits_and_seeds_differ_and_the_same_seed_gives_the_same(monkeypatch, tmp_path):
    firsts = [small(seed=seed).records(split)["fields"] for seed in (0, 1) for split in ("train", "valid", "test")]
    for i, one in enumerate(firsts):
        assert not any((one == other).all() for other in firsts[i + 1 :])
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "another"))
    assert (small().records("train")["fields"] == firsts[0]).all()


def test_simulations_are_generated_once_and_read_from_disk(cache, monkeypatch):
    first = small().records("train")
    assert isinstance(first, np.memmap)
    assert [file.suffix for file in cache.iterdir() if file.suffix != ".lock"] == [".npy"]
    again = small(merge_fields=True)
    assert again.data_info == {"generator": again.generator_hash}  # of a sample
    monkeypatch.setattr(Collision, "simulate", None)
    assert (again.records("train") == first).all()


@pytest.mark.parametrize(
    ("arguments", "batch", "block", "message"),
    [
        ({}, 3, 8, r"task.num_simulations must be a multiple of the batch_size=3, got 4"),
        ({}, 2, 12, r"block_size must be a multiple of the 8 tokens of a timestep, got 12"),
        ({"grid_size": 5}, 2, 8, r"task.grid_size must be even"),
        ({"num_colors": 16}, 2, 8, r"task.num_colors must be from 1 to 15, got 16"),
        ({"color_change_prob": 1.5}, 2, 8, r"task.color_change_prob .* got 1.5"),
        ({"last_collision_question_fraction": -1}, 2, 8, r"task.last_collision_question_fraction .* got -1"),
        ({"velocity_std": 0}, 2, 8, r"task.velocity_std must be above 0"),
        ({"timesteps": 3}, 2, 8, r"task.num_simulations must be from 1 to task.timesteps=3, got 4"),
        ({"eval_simulations": 0}, 2, 8, r"task.eval_simulations must be .*, got 0"),
        ({"seed": -1}, 2, 8, r"seed"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, batch, block, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments).stream("train", batch, block)
