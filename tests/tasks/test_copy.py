import pytest
import torch

from expire_span.tasks.base import IGNORE_INDEX
from expire_span.tasks.copy import CUE, STOP, A, Copy


def join(blocks):
    return [torch.cat(part, dim=1) for part in zip(*blocks, strict=True) if part[0] is not None]


def test_the_targets_are_as_many_as_were_shown_and_then_a_full_stop():
    block = 12
    stream = Copy(episode_length=48, num_eval_episodes=64).stream("test", 32, block)
    for _ in range(2):
        tokens, targets, _, distances = join([next(stream) for _ in range(4)])
        for row, target, distance in zip(tokens.tolist(), targets.tolist(), distances.tolist(), strict=True):
            cue = row.index(CUE)
            shown = [time for time in range(cue) if row[time] == A]
            assert 1 <= len(shown) <= 4
            assert shown == list(range(shown[0], shown[0] + len(shown))), "in a row"
            scored = [time for time in range(48) if target[time] != IGNORE_INDEX]
            assert scored == list(range(cue, cue + len(shown) + 1))
            assert [target[time] for time in scored] == [A] * len(shown) + [STOP]
            assert [row[time + 1] for time in scored] == [target[time] for time in scored], "the next token"
            assert {distance[time] for time in scored} == {cue - shown[-1]}
            assert cue >= 48 - block, "answered in the last block"
            assert row.count(A) == 2 * len(shown)


def test_every_distance_and_every_count_is_drawn_equally_often():
    stream = Copy(episode_length=16, num_eval_episodes=20_000).stream("test", 20_000, 8)
    *_, last = stream
    distances = last.answer_distance.max(dim=1).values
    assert set(distances.tolist()) == set(range(1, 16 - 6 - 3 + 1))
    assert torch.bincount(distances)[1:].min() > 0.9 * 20_000 / 7
    counts = (last.targets == A).sum(dim=1)
    assert torch.bincount(counts)[1:].min() > 0.9 * 20_000 / 4


def test_reach_ends_at_the_beginning_of_the_episode():
    stream = Copy(episode_length=24).stream("train", 2, 12)
    reach = join([next(stream) for _ in range(4)])[2]
    assert reach.tolist() == [[*range(24), *range(24)]] * 2


def test_a_split_has_all_its_episodes_in_whole_batches_for_every_batch_size():
    task = Copy(episode_length=24, num_eval_episodes=10)
    counted = [torch.cat([batch.targets for batch in task.stream("valid", size, 24)]) for size in (4, 5)]
    assert [len(targets) for targets in counted] == [12, 10]
    assert torch.equal(counted[0][:10], counted[1]), "an episode depends on its number only"


def test_splits_and_seeds_differ():
    tasks = [Copy(episode_length=96, seed=seed) for seed in (0, 1)]
    firsts = [next(task.stream(split, 32, 96)).tokens for task in tasks for split in ("train", "valid", "test")]
    for i, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[i + 1 :])


def test_a_saved_stream_resumes_where_it_was_saved():
    task = Copy(episode_length=96, initial_episode_length=24)
    stream = task.stream("train", 4, 12)
    for _ in range(3):
        next(stream)
    task.update_curriculum(1.0)
    saved = stream.state_dict(), task.state_dict()
    expected_batches = [next(stream) for _ in range(13)]
    again = Copy(episode_length=96, initial_episode_length=24)
    resumed = again.stream("train", 4, 12)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for expected in expected_batches:
        for one, other in zip(expected, next(resumed), strict=True):
            assert one is other is None or torch.equal(one, other)
    assert expected_batches[-1].reach.max() == 47, "longer by then"


def finish_episode(stream):
    """Read up to the answer of the next episode, and return the length of the episode."""
    while (batch := next(stream)).targets.max() == IGNORE_INDEX:
        pass
    return int(batch.reach.max()) + 1


def test_episodes_lengthen_once_the_threshold_is_reached_and_never_beyond_episode_length():
    task = Copy(episode_length=60, initial_episode_length=12, curriculum_threshold=0.8)
    stream = task.stream("train", 2, 12)
    lengths = []
    for accuracy in (0.1, 0.79, 0.8, 0.9, float("nan"), 0.95, 1.0):
        lengths.append(finish_episode(stream))
        task.update_curriculum(accuracy)
    assert lengths == [12, 12, 12, 24, 48, 48, 60]


def test_the_length_grows_only_between_episodes_and_accuracy_on_shorter_ones_does_not_count():
    task = Copy(episode_length=96, initial_episode_length=24)
    stream = task.stream("train", 2, 12)
    finish_episode(stream)
    next(stream)
    task.update_curriculum(1.0)
    assert finish_episode(stream) == 24, "the episode in progress keeps its length"
    task.update_curriculum(1.0)
    assert finish_episode(stream) == 48, "its accuracy says nothing about longer ones"


def test_episodes_that_are_not_learned_lengthen_after_curriculum_max_intervals():
    task = Copy(episode_length=48, initial_episode_length=12, curriculum_max_intervals=2)
    stream = task.stream("train", 2, 12)
    lengths = []
    for _ in range(5):
        lengths.append(finish_episode(stream))
        task.update_curriculum(0.0)
        task.update_curriculum(float("nan"))  # nothing was answered: this does not count
    assert lengths == [12, 12, 24, 24, 48]


def test_evaluation_episodes_have_the_full_length_from_the_start():
    task = Copy(episode_length=48, initial_episode_length=12, num_eval_episodes=2)
    assert finish_episode(task.stream("valid", 2, 12)) == 48


def test_128k_timesteps_cost_no_more_than_their_blocks():
    stream = Copy(episode_length=131_072, num_eval_episodes=1).stream("test", 1, 4096)
    *_, last = stream
    assert last.reach[0, -1] == 131_071
    assert (last.targets != IGNORE_INDEX).sum() >= 2


@pytest.mark.parametrize(
    ("arguments", "block", "message"),
    [
        ({"episode_length": 100}, 16, r"task.episode_length must be a multiple of block_size=16, got 100; use 112"),
        (
            {"episode_length": 64, "initial_episode_length": 24},
            16,
            r"initial_episode_length must be a multiple of block_size=16, got 24",
        ),
        ({"episode_length": 64, "initial_episode_length": 128}, 16, r"task.initial_episode_length must be .*, got 128"),
        ({"episode_length": 8}, 8, r"task.episode_length must be at least 10"),
        ({"episode_length": 64}, 4, r"block_size must hold the answer, 6 timesteps, got 4"),
        ({"episode_length": 64, "max_count": 0}, 16, r"task.max_count"),
        ({"episode_length": 64, "curriculum_max_intervals": 0}, 16, r"task.curriculum_max_intervals"),
        ({"episode_length": 64, "num_eval_episodes": 0}, 16, r"task.num_eval_episodes"),
        ({"episode_length": 64, "seed": -1}, 16, r"seed"),
    ],
)
def test_invalid_arguments_are_refused_by_name(arguments, block, message):
    with pytest.raises(ValueError, match=message):
        Copy(**arguments).stream("train", 2, block)
