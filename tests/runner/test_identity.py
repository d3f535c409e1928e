"""A run folder belongs to one config and one text, so that its curve has one meaning."""

import json

import pytest
from tiny_config import tiny_config

from expire_span.runner.run_folder.identity import MAY_CHANGE_IN_RESUME, check_same_data, check_same_run
from expire_span.runner.train import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config("train.updates=2"), folder)
    return folder


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("memory.alpha=0.5", "memory.alpha=0.001"),
        ("optimizer.lr=0.1", "optimizer.lr=0.002"),
        ("train.grad_clip=2.0", "train.grad_clip=1.0"),
        ("run.precision=bfloat16", "run.precision=float32"),
        ("task.max_count=2", "task.max_count="),
        ("seed=2", "seed=1"),
        ("transformer.dropout=0.1", "transformer.dropout=0.0"),
        ("lr_schedule.warmup_updates=1", "lr_schedule.warmup_updates=2"),
    ],
)
def test_a_folder_does_not_go_on_with_a_value_that_changes_its_curve(finished, override, named):
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a run with .*; use another hydra.run.dir") as caught:
        train(tiny_config("train.updates=4", override), finished)
    assert named in str(caught.value)
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_what_does_not_change_the_curve_may_change_and_is_recorded(folder):
    train(tiny_config("train.updates=2"), folder)
    other = ["train.updates=4", "run.log_every=1", "eval.max_blocks=4", "run.num_threads=2", "wandb.tags=[x]"]
    train(tiny_config(*other, "transformer.attention_backend=torch"), folder)
    [change] = json.loads((folder / "summary.json").read_text())["changes"]
    assert change.pop("update") == 2
    assert change == {
        "train.updates": [2, 4],
        "run.log_every": [2, 1],
        "run.num_threads": [1, 2],
        "eval.max_blocks": [8, 4],
        "wandb.tags": [[], ["x"]],
        "transformer.attention_backend": ["auto", "torch"],
    }


def test_an_explicit_resume_may_change_how_weights_are_updated_but_not_the_optimizer_or_the_model():
    saved = {"optimizer": {"_target_": "Adam", "lr": 1.0}, "memory": {"alpha": 1.0}}
    check_same_run("run", saved, {**saved, "optimizer": {"_target_": "Adam", "lr": 0.1}}, MAY_CHANGE_IN_RESUME)
    for other in ({"optimizer": {"_target_": "SGD", "lr": 1.0}}, {"memory": {"alpha": 2.0}}):
        with pytest.raises(ValueError, match="holds a run with"):
            check_same_run("run", saved, saved | other, MAY_CHANGE_IN_RESUME)


def test_a_run_does_not_go_on_after_its_text_has_grown(folder, text):
    """Otherwise what was the test part becomes a part of the training text."""
    train(tiny_config("train.updates=2", task="text", text=text), folder)
    text.write_text(text.read_text() + "one more line")
    with pytest.raises(ValueError, match=r"the data of .* has changed \(data.sha256 was .*restore it"):
        train(tiny_config("train.updates=4", task="text", text=text), folder)


def test_a_change_of_the_files_that_were_skipped_is_no_change_of_the_data():
    check_same_data("run", {"sha256": "a", "files": {"skipped": 1}}, {"sha256": "a", "files": {"skipped": 2}})
