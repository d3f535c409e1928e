import pytest
import torch

from expire_span.tasks.copy import CUE, STOP, A, Copy
from expire_span.tasks.stream import IGNORED


def join(blocks):
    return [torch.cat(part, dim=1) for part in zip(*blocks, strict=True) if part[0] is not None]


def test_the_answer_is_as_many_as_were_shown_and_then_a_full_stop():
    block = 12
    stream = Copy(distance=48, episodes=64).stream("test", 32, block)
    for _ in range(2):
        tokens, targets, _, distances = join([next(stream) for _ in range(4)])
        for row, target, distance in zip(tokens.tolist(), targets.tolist(), distances.tolist(), strict=True):
            cue = row.index(CUE)
            shown = [place for place in range(cue) if row[place] == A]
            assert 1 <= len(shown) <= 4
            assert shown == list(range(shown[0], shown[0] + len(shown))), "in a row"
            asked = [place for place in range(48) if target[place] != IGNORED]
            assert asked == list(range(cue, cue + len(shown) + 1))
            assert [target[place] for place in asked] == [A] * len(shown) + [STOP]
            assert [row[place + 1] for place in asked] == [target[place] for place in asked], "the next token"
            assert {distance[place] for place in asked} == {cue - shown[-1]}
            assert cue >= 48 - block, "answered in the last block"
            assert row.count(A) == 2 * len(shown)


def test_every_distance_and_every_count_is_drawn_equally_often():
    stream = Copy(distance=16, episodes=20_000).stream("test", 20_000, 8)
    *_, last = stream
    distances = last.distance.max(dim=1).values
    assert set(distances.tolist()) == set(range(1, 16 - 6 - 3 + 1))
    assert torch.bincount(distances)[1:].min() > 0.9 * 20_000 / 7
    counts = (last.targets == A).sum(dim=1)
    assert torch.bincount(counts)[1:].min() > 0.9 * 20_000 / 4


def test_reach_ends_at_the_beginning_of_the_episode():
    stream = Copy(distance=24).stream("train", 2, 12)
    reach = join([next(stream) for _ in range(4)])[2]
    assert reach.tolist() == [[*range(24), *range(24)]] * 2


def test_a_split_has_all_its_episodes_in_whole_batches_whatever_the_batch():
    task = Copy(distance=24, episodes=10)
    counted = [torch.cat([batch.targets for batch in task.stream("valid", size, 24)]) for size in (4, 5)]
    assert [len(targets) for targets in counted] == [12, 10]
    assert torch.equal(counted[0][:10], counted[1]), "an episode depends on its number only"


def test_splits_and_seeds_differ():
    tasks = [Copy(distance=96, seed=seed) for seed in (0, 1)]
    firsts = [next(task.stream(split, 32, 96)).tokens for task in tasks for split in ("train", "valid", "test")]
    for i, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[i + 1 :])


def test_a_saved_stream_goes_on_where_it_was_saved():
    task = Copy(distance=96, first_distance=24)
    stream = task.stream("train", 4, 12)
    for _ in range(3):
        next(stream)
    task.feedback(1.0)
    saved = stream.state_dict(), task.state_dict()
    further = [next(stream) for _ in range(13)]
    again = Copy(distance=96, first_distance=24)
    resumed = again.stream("train", 4, 12)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for expected in further:
        for one, other in zip(expected[:4], next(resumed)[:4], strict=True):  # no answer
            assert torch.equal(one, other)
    assert further[-1].reach.max() == 47, "longer by then"


def answer(stream):
    """Goes through the episode that comes next, and returns its length."""
    while (batch := next(stream)).targets.max() == IGNORED:
        pass
    return int(batch.reach.max()) + 1


def test_episodes_lengthen_once_the_bar_is_reached_and_never_beyond_the_distance():
    task = Copy(distance=60, first_distance=12, bar=0.8)
    stream = task.stream("train", 2, 12)
    lengths = []
    for accuracy in (0.1, 0.79, 0.8, 0.9, float("nan"), 0.95, 1.0):
        lengths.append(answer(stream))
        task.feedback(accuracy)
    assert lengths == [12, 12, 12, 24, 48, 48, 60]


def test_the_length_grows_between_episodes_only_and_not_by_what_shorter_ones_gave():
    task = Copy(distance=96, first_distance=24)
    stream = task.stream("train", 2, 12)
    answer(stream)
    next(stream)
    task.feedback(1.0)
    assert answer(stream) == 24, "the one begun goes on as it was"
    task.feedback(1.0)
    assert answer(stream) == 48, "and says nothing about the longer ones"


def test_patience_lengthens_episodes_that_are_not_learned():
    task = Copy(distance=48, first_distance=12, patience=2)
    stream = task.stream("train", 2, 12)
    lengths = []
    for _ in range(5):
        lengths.append(answer(stream))
        task.feedback(0.0)
        task.feedback(float("nan"))  # nothing was answered: no reason for impatience
    assert lengths == [12, 12, 24, 24, 48]


def test_evaluation_is_at_the_full_distance_from_the_start():
    task = Copy(distance=48, first_distance=12, episodes=2)
    assert answer(task.stream("valid", 2, 12)) == 48


def test_128k_timesteps_cost_no_more_than_their_blocks():
    stream = Copy(distance=131_072, episodes=1).stream("test", 1, 4096)
    *_, last = stream
    assert last.reach[0, -1] == 131_071
    assert (last.targets != IGNORED).sum() >= 2


@pytest.mark.parametrize(
    ("arguments", "block", "message"),
    [
        ({"distance": 100}, 16, r"task.distance must be a multiple of block=16, got 100; use 112"),
        ({"distance": 64, "first_distance": 24}, 16, r"task.first_distance must be a multiple of block=16, got 24"),
        ({"distance": 64, "first_distance": 128}, 16, r"task.first_distance must be .*, got 128"),
        ({"distance": 8}, 8, r"task.distance must be at least 10"),
        ({"distance": 64}, 4, r"block must hold the answer, 6 timesteps, got 4"),
        ({"distance": 64, "largest_count": 0}, 16, r"task.largest_count"),
        ({"distance": 64, "patience": 0}, 16, r"task.patience"),
        ({"distance": 64, "episodes": 0}, 16, r"task.episodes"),
        ({"distance": 64, "seed": -1}, 16, r"seed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, block, message):
    with pytest.raises(ValueError, match=message):
        Copy(**arguments).stream("train", 2, block)
