import math

import pytest
import torch

from expire_span.tasks.base import METRICS, SCORINGS, Batch, RLTask, Task
from expire_span.tasks.collision import Collision
from expire_span.tasks.collision_easy import CollisionEasy
from expire_span.tasks.copy import Copy
from expire_span.tasks.corridor import Corridor
from expire_span.tasks.enwik8 import Enwik8
from expire_span.tasks.instruction import Instruction
from expire_span.tasks.pg19 import PG19
from expire_span.tasks.portal import Portal
from expire_span.tasks.text import Text
from expire_span.tasks.token_stream import text_codec
from expire_span.tasks.wikitext103 import Wikitext103

STREAM_TASKS = [Collision, CollisionEasy, Copy, Enwik8, Instruction, PG19, Text, Wikitext103]


class Ones(Task):
    """A task of a user's own, with the five required members only."""

    vocab_size = num_classes = 2
    metric = "accuracy"
    scoring = "token"

    def stream(self, split, batch_size, block_size):
        ones = torch.ones(batch_size, block_size, dtype=torch.int64)
        return iter([Batch(ones, ones)])


def test_a_task_needs_only_five_members():
    task = Ones()
    assert next(task.stream("train", 2, 3)).tokens.shape == (2, 3)
    assert (task.extra_metrics, task.vocab, task.data_info, task.curriculum_stage) == ((), None, None, None)
    assert task.bytes_per_token("train") == 1.0
    task.update_curriculum(math.nan)
    task.load_state_dict(task.state_dict())


def test_a_task_without_a_stream_is_refused():
    class Incomplete(Task):
        vocab_size = num_classes = 2

    with pytest.raises(TypeError, match="stream"):
        Incomplete()


@pytest.mark.parametrize("task", STREAM_TASKS, ids=lambda task: task.__name__)
def test_metrics_and_scorings_of_the_tasks_are_allowed(task):
    assert {task.metric, *task.extra_metrics} <= set(METRICS)
    assert task.scoring in SCORINGS


@pytest.mark.parametrize("task", [Corridor(max_length=4), Portal(num_rooms=2)], ids=["corridor", "portal"])
def test_metrics_of_acting_tasks_are_keys_of_their_episode_info(task):
    assert isinstance(task, RLTask)
    envs = task.make_envs(2)
    envs.step(torch.zeros(2, dtype=torch.int64))
    assert {task.metric, task.progress_metric} <= set(envs.episode_info)
    assert {"success", "episode_return", "episode_length", "truncated"} <= set(envs.episode_info)


def test_text_codec_writes_words_and_reads_them_again():
    task = Instruction(distractors=5)
    encode, decode = text_codec(task)
    text = b"".join(decode(token) for token in encode("you are the miller zebra"))
    assert text == b"you are the miller <unknown> "


def test_text_codec_refuses_a_task_that_does_not_predict_text():
    with pytest.raises(ValueError, match="task Ones does not predict text"):
        text_codec(Ones())
    with pytest.raises(ValueError, match="task Collision does not predict text"):
        text_codec(Collision())
