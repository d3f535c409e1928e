"""Generated data stay the same, bit for bit, for the same arguments: results can be compared across versions."""

import hashlib

import pytest
import torch

from expire_span.tasks.base import Batch
from expire_span.tasks.collision import Collision
from expire_span.tasks.collision_easy import CollisionEasy
from expire_span.tasks.copy import Copy
from expire_span.tasks.corridor import Corridor
from expire_span.tasks.instruction import Instruction
from expire_span.tasks.portal import Portal

SIMULATIONS = {"timesteps": 4000, "eval_timesteps": 2000, "num_simulations": 8, "eval_simulations": 4, "seed": 2}
COLLISION = {"grid_size": 8, "num_colors": 3, "color_change_prob": 0.1, "velocity_std": 0.7, **SIMULATIONS}
COLLISION["last_collision_question_fraction"] = 0.5
EASY = {"grid_size": 6, "mapping_question_fraction": 0.4, "velocity_std": 0.7, **SIMULATIONS}
COPY = {"episode_length": 96, "initial_episode_length": 24, "max_count": 3, "num_eval_episodes": 24, "seed": 2}
INSTRUCTION = {"distractors": 6, "initial_distractors": 2, "num_rooms": 6, "num_agents": 7, "max_pending": 3, "seed": 2}
CORRIDOR = {"min_length": 2, "max_length": 12, "initial_max_length": 4, "eval_max_length": 14, "seed": 2}
PORTAL = {"num_rooms": 5, "room_size": 3, "max_mistakes": 3, "max_episode_steps": 60, "initial_num_rooms": 3, "seed": 2}


def digest(tensors):
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(str((tuple(tensor.shape), str(tensor.dtype))).encode())
        sha256.update(tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]


@pytest.mark.parametrize(
    ("task", "arguments", "batch_size", "block_size", "expected"),
    [
        (Copy, COPY, 4, 24, "60c21fac697bcd47"),
        (Collision, COLLISION, 4, 40, "eb0d4a5cd729b96e"),
        (Collision, COLLISION | {"merge_fields": True}, 4, 40, "1c30654d51a54f57"),
        (CollisionEasy, EASY, 4, 40, "206da12c6542e6d8"),
        (CollisionEasy, EASY | {"merge_fields": True}, 4, 40, "6d4092129ef1d0aa"),
        (Instruction, INSTRUCTION | {"instruction_prob": 0.5}, 3, 128, "c7ed4f0143fef063"),
    ],
    ids=["copy", "collision", "collision merged", "collision_easy", "collision_easy merged", "instruction"],
)
def test_generated_streams_have_not_changed(monkeypatch, tmp_path, task, arguments, batch_size, block_size, expected):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    task, tensors = task(**arguments), []
    for split in ("train", "valid", "test"):
        stream = task.stream(split, batch_size, block_size)
        for _ in range(6):
            batch: Batch = next(stream)
            tensors += [field for field in batch if field is not None]
            if split == "train":
                task.update_curriculum(0.95)
    assert digest(tensors) == expected


@pytest.mark.parametrize(("task", "arguments"), [(Collision, COLLISION), (CollisionEasy, EASY)])
def test_cached_data_of_another_version_of_the_generator_are_not_used(monkeypatch, tmp_path, task, arguments):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    before, same = task(**arguments), task(**arguments)
    assert (before.records("test") == same.records("test")).all()
    assert len(list(tmp_path.glob("*.npy"))) == 1
    whole_quadrants = task.quadrants
    monkeypatch.setattr(task, "quadrants", lambda self, cells: 3 - whole_quadrants(self, cells))
    after = task(**arguments)
    assert (before.records("test")["answer"] != after.records("test")["answer"]).any()
    assert len(list(tmp_path.glob("*.npy"))) == 2
    assert before.data_info == same.data_info != after.data_info


@pytest.mark.parametrize(("task", "arguments"), [(Collision, COLLISION), (CollisionEasy, EASY)])
def test_what_a_summary_says_of_the_data_is_the_same_for_every_seed(monkeypatch, tmp_path, task, arguments):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path))
    first, second = (task(**arguments | {"seed": seed}) for seed in (1, 2))
    assert first.data_info == second.data_info  # or their runs would share no row of a report
    blocks = [next(each.stream("train", 2, 40)) for each in (first, second)]
    assert not torch.equal(blocks[0].tokens, blocks[1].tokens)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(Corridor(observe_last_action=True, **CORRIDOR), "ae18c2949c7bb237"), (Portal(**PORTAL), "b8d7ebbc08f1b6e6")],
    ids=["corridor", "portal"],
)
def test_generated_gridworlds_have_not_changed(task, expected):
    tensors = []
    for split in ("train", "valid"):
        envs = task.make_envs(8, seed=3, split=split)
        generator = torch.Generator().manual_seed(0)
        for step in range(300):
            reward, done = envs.step(torch.randint(4, (8,), generator=generator))
            info = [envs.episode_info[name] for name in ("truncated", "episode_length", "episode_return", "success")]
            tensors += [envs.observe(), reward, done, envs.steps, *info]
            if step % 50 == 0 and split == "train":
                task.update_curriculum(0.95)
    assert digest(tensors) == expected
