"""Several processes, or micro-batches, compute what one process computes with the whole batch."""

import math
import shutil

import pytest
import torch
from forked_ranks import run_ranks
from rank_functions import message_of_full_disk, messages_of_training, train_as_rank, train_until
from tiny_config import config_options, tiny_config

from expire_span.runner import micro_batches
from expire_span.runner.cost_model import expected_memories, memory_by_part, run_sizes
from expire_span.runner.evaluate import evaluate_run
from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.files import read_metrics, read_summary
from expire_span.runner.train import train

SHARED = [
    "eval.max_blocks=8",
    "eval.splits=[test]",
    "train.batch_size=6",
    "eval.batch_size=6",
    "run.precision=float64",
    "run.log_every=1",
    "eval.interval=2",
]
EXTRA = {
    "copy": ["memory.random_drop=true"],
    "instruction": ["train.grad_accumulation=2"],
    "gymnasium": [
        "task.normalize_observation=false",
        "task.normalize_reward=false",
        "actor_critic.update_epochs=2",
        "eval.max_blocks=1",
        "eval.interval=4",
    ],
    "corridor": ["actor_critic.update_epochs=2", "eval.max_blocks=1", "eval.interval=4"],
}
BUDGET = ["memory.budget=9", "model.ramp=8", "alpha_schedule.start_update=0", "alpha_schedule.warmup_updates=0"]
BUDGETS = {"expire_span": BUDGET, "adaptive_span": BUDGET}
TASKS = ["text", "copy", "instruction", "corridor"]
PAIRS = [  # every task and every model of the paper once; the others are slow tests
    ("text", "compressive"),
    ("copy", "expire_span"),
    ("instruction", "adaptive_span"),
    ("corridor", "trans_xl"),
]


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    """A function that gives the config and the folder of the run of one process with the whole batch."""
    runs = {}

    def run(task, model):
        if (task, model) not in runs:
            folder = tmp_path_factory.mktemp(f"{task}-{model}")
            text = folder / "text.txt"
            text.write_text("".join(f"{number} bottles of beer on the wall. " for number in range(300)))
            overrides = [*SHARED, f"model={model}", *EXTRA.get(task, []), *BUDGETS.get(model, [])]
            (folder / "run").mkdir()
            runs[task, model] = (overrides, text), folder / "run"
            train(tiny_config(*overrides, task=task, text=text), folder / "run")
        return runs[task, model]

    return run


def assert_same_run(expected, actual, rel=1e-10):
    """The same figures at the same updates, but for times and memory, and the same weights."""
    rows, other_rows = (read_metrics(folder / "metrics.jsonl") for folder in (expected, actual))
    assert len(rows) == len(other_rows)
    for row, other in zip(rows, other_rows, strict=True):
        assert row.keys() == other.keys()
        for name in [name for name in row if not name.startswith("perf/")]:
            same = math.isnan(row[name]) and math.isnan(other[name])
            assert same or other[name] == pytest.approx(row[name], rel=rel, abs=rel), (row["update"], name)
    weights, other_weights = (checkpoint.load(folder)["model"] for folder in (expected, actual))
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=rel, msg=name)
    assert read_summary(expected)["protocol"] == read_summary(actual)["protocol"]


@pytest.mark.parametrize(
    ("task", "model"),
    [
        pytest.param(task, model, marks=() if (task, model) in PAIRS else pytest.mark.slow)
        for task in TASKS
        for model in config_options("model")
    ],
)
def test_micro_batches_give_the_result_of_the_whole_batch(task, model, whole_batch, tmp_path):
    (overrides, text), expected = whole_batch(task, model)
    train(tiny_config(*overrides, "train.micro_batch_size=2", task=task, text=text), tmp_path)
    assert_same_run(expected, tmp_path)


@pytest.mark.parametrize(
    ("task", "model", "world_size", "micro_batch_size"),
    [*((*pair, 2, "null") for pair in PAIRS), (*PAIRS[1], 3, "1")],
)
def test_several_processes_give_the_result_of_one(task, model, world_size, micro_batch_size, whole_batch, tmp_path):
    (overrides, text), expected = whole_batch(task, model)
    config = tiny_config(*overrides, f"train.micro_batch_size={micro_batch_size}", task=task, text=text)
    run_ranks(world_size, train_as_rank, config, tmp_path)
    assert_same_run(expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("task", [*TASKS, "gymnasium"])
@pytest.mark.parametrize("model", config_options("model"))
def test_several_processes_give_the_result_of_one_for_every_model_and_task(
    model, task, world_size, whole_batch, tmp_path
):
    (overrides, text), expected = whole_batch(task, model)
    run_ranks(world_size, train_as_rank, tiny_config(*overrides, task=task, text=text), tmp_path)
    assert_same_run(expected, tmp_path)


@pytest.mark.parametrize("task", ["copy", "corridor"])
def test_a_run_goes_on_with_another_number_of_processes_and_another_micro_batch(task, whole_batch, tmp_path):
    (overrides, text), expected = whole_batch(task, "expire_span")
    losses = []
    for world_size, update, micro_batch_size in ((2, 1, 3), (3, 3, 1), (1, 4, 2)):  # corridor: between its epochs, too
        config = tiny_config(*overrides, f"train.micro_batch_size={micro_batch_size}", task=task, text=text)
        arguments = (config, tmp_path, update)
        of_ranks = [train_until(0, *arguments)] if world_size == 1 else run_ranks(world_size, train_until, *arguments)
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        losses += of_ranks[0]
    rows = read_metrics(expected / "metrics.jsonl")
    assert losses == pytest.approx([row["train/loss"] for row in rows if "train/loss" in row], rel=1e-10)
    of_ranks = sorted(path.name for path in tmp_path.glob("*.rank_*"))  # of update 3, which is kept; not of 1
    assert of_ranks == [f"checkpoint_3.rank_{rank}_of_3.pt" for rank in range(3)]


def test_a_checkpoint_that_lacks_the_file_of_a_rank_counts_as_damaged(whole_batch, tmp_path):
    (overrides, text), _ = whole_batch("text", "trans_xl")
    config = tiny_config(*overrides, "run.checkpoint_every=2", task="text", text=text)
    run_ranks(2, train_as_rank, config, tmp_path)
    assert checkpoint.load(tmp_path, slice(0, 6))["update"] == 4
    (tmp_path / "checkpoint_4.rank_1_of_2.pt").unlink()
    assert checkpoint.load(tmp_path, slice(0, 6))["update"] == 2
    assert checkpoint.load(tmp_path, slice(0, 3))["update"] == 4  # of which the other rank has nothing
    assert "update 2 is saved" in checkpoint.how_to_go_on(tmp_path)


def test_a_full_disk_of_one_rank_ends_all_with_how_to_go_on(whole_batch, tmp_path):
    (overrides, text), _ = whole_batch("text", "trans_xl")
    configs = [tiny_config(*overrides, f"train.updates={count}", task="text", text=text) for count in (2, 4)]
    messages = run_ranks(2, message_of_full_disk, *configs, tmp_path)
    assert messages[0].startswith("rank 1: ")
    for message in messages:
        assert "could not be written" in message
        assert "update 2 is saved; to resume: expire-span resume=" in message


def test_files_of_ranks_that_were_saved_at_another_time_count_as_damaged(whole_batch, tmp_path):
    (overrides, text), _ = whole_batch("text", "trans_xl")
    config = tiny_config(*overrides, "train.updates=2", "run.checkpoint_every=1", task="text", text=text)
    for name in "ab":
        (tmp_path / name).mkdir()
        run_ranks(2, train_as_rank, config, tmp_path / name)
    shutil.copy(tmp_path / "a/checkpoint_2.rank_1_of_2.pt", tmp_path / "b")
    assert checkpoint.load(tmp_path / "b", slice(0, 6))["update"] == 1


def test_without_memories_a_checkpoint_is_smaller_and_the_summary_says_that_they_were_lost(whole_batch, tmp_path):
    (overrides, text), expected = whole_batch("text", "trans_xl")
    overrides = [*overrides, "run.checkpoint_memories=false"]
    shutil.copytree(expected, tmp_path, dirs_exist_ok=True)
    config = tiny_config(*overrides, "train.updates=5", task="text", text=text)
    train(config, tmp_path)
    assert not any("memories" in change for change in read_summary(tmp_path)["changes"])  # the old one has them
    before, smaller = (next(iter(checkpoint.paths(folder))).stat().st_size for folder in (expected, tmp_path))
    assert before - smaller > 6 * read_metrics(expected / "metrics.jsonl")[-3]["memory/bytes"]
    train(tiny_config(*overrides, "train.updates=6", task="text", text=text), tmp_path)
    assert {"update": 5, "memories": ["lost", "empty"]} in read_summary(tmp_path)["changes"]


REFUSED = {
    "train.batch_size=5": "train.batch_size=5 cannot be divided among 2 processes",
    "train.batch_size=1": "train.batch_size=1 cannot be divided among 2 processes",
    "eval.batch_size=5": "eval.batch_size=5 cannot be divided among 2 processes",
    "train.micro_batch_size=2": "train.micro_batch_size=2 must divide the 3 streams of each of the 2 processes",
}


def test_streams_that_cannot_be_divided_are_refused(tmp_path):
    configs = [tiny_config("train.batch_size=6", "eval.batch_size=6", override) for override in REFUSED]
    for messages in run_ranks(2, messages_of_training, configs, tmp_path):
        for message, expected in zip(messages, REFUSED.values(), strict=True):
            assert expected in message


def test_auto_finds_a_micro_batch_that_fits_says_so_and_changes_no_result(whole_batch, tmp_path, monkeypatch, caplog):
    (overrides, text), expected = whole_batch("text", "expire_span")
    config = tiny_config(*overrides, "train.micro_batch_size=auto", task="text", text=text)
    sizes = run_sizes(config, 256, 256)
    held = expected_memories(sizes.mechanism)
    needed = {size: sum(memory_by_part(sizes, 6, size, held, "cpu").values()) for size in (2, 3)}
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: (needed[2] + needed[3]) / 2 / 0.9)
    with caplog.at_level("INFO"):
        train(config, tmp_path)
    assert "auto: 2 of 6 streams at a time are predicted to fit" in caplog.text
    assert_same_run(expected, tmp_path)
    evaluated = evaluate_run(
        tiny_config(*overrides, "train.micro_batch_size=auto", task="text", text=text), tmp_path, tmp_path
    )
    assert evaluated["test/loss"] == pytest.approx(read_metrics(expected / "metrics.jsonl")[-1]["test/loss"])
