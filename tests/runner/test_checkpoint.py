"""Checkpoints: damage is found, the one before is used, and what is no checkpoint is refused in one line."""

import math
import os
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_config import tiny_config

from expire_span.runner.evaluate import evaluate_run
from expire_span.runner.load_run import load_run
from expire_span.runner.run_folder import checkpoint, weights
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.run_folder.identity import MAY_CHANGE_IN_RESUME
from expire_span.runner.train import evaluate, train, train_step
from expire_span.runner.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of updates 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def resumed_update(run):
    trainer = Trainer(tiny_config(), run)
    assert trainer.load_checkpoint()
    return trainer.update


def test_restored_memories_know_their_oldest_age_as_those_of_a_run_that_goes_on_do(run):
    """Otherwise a compiled model would be compiled once more for the first block."""
    trainer = Trainer(tiny_config(), run)
    assert trainer.load_checkpoint()
    for memory in trainer.states[0]["layers"]:
        assert memory.max_age == (trainer.states[0]["step"] - memory.time).max() > 0


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_and_the_checkpoint_before_it_is_used(run, caplog):
    newest = run / "checkpoint_4.pt"
    size, whole = newest.stat().st_size, newest.read_bytes()
    bits = [random.Random(1).randrange(8 * size) for _ in range(60)]
    for bit in [0, 8 * size - 1, *bits]:
        flip_bit(newest, bit)
        assert checkpoint.load(run)["update"] == 2, bit
        newest.write_bytes(whole)
    assert caplog.messages == [f"{newest} is damaged, and the checkpoint before it is used"] * 62
    assert checkpoint.load(run)["update"] == 4


@pytest.mark.parametrize("damage", [lambda content: content[:1000], lambda content: b"", lambda content: bytes(9999)])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it(damage, run):
    newest = run / "checkpoint_4.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert resumed_update(run) == 2
    (run / "checkpoint_2.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match="no checkpoint in .* is intact; remove .*checkpoint_4.pt and .*_2.pt to start"
    ):
        resumed_update(run)


def test_a_checkpoint_of_before_some_keys_were_added_goes_on_without_a_change(run):
    content = checkpoint.load(run)
    for section, key in (("memory", "budget"), ("wandb", "log_model"), ("train", "curriculum_interval")):
        del content["config"][section][key]
    del content["config"]["tracker"], content["config"]["milestones"], content["memory_budget"]
    save(run, content)
    trainer = Trainer(tiny_config(), run)
    assert trainer.load_checkpoint()
    assert trainer.changes == []


def save(folder, content):
    """Write a checkpoint, and remove those that it replaces."""
    checkpoint.save(folder, content, content["streams"][0])
    checkpoint.prune(folder, content["update"], keep=2)


def test_a_damaged_checkpoint_never_takes_the_place_of_an_intact_one(run):
    """Even if the run that goes on from the intact one dies at any step of saving its next checkpoint."""
    flip_bit(run / "checkpoint_4.pt", 80_000)
    content = checkpoint.load(run)
    for update in (3, 5):  # before and after the damaged one
        copy = shutil.copytree(run, run.parent / f"saved at {update}")
        save(copy, content | {"update": update})
        assert checkpoint.load(copy)["update"] == update
        newest, before = checkpoint.paths(copy)
        newest.unlink()
        assert before.name == ("checkpoint_2.pt" if update == 3 else "checkpoint_4.pt")


def test_a_death_at_any_step_of_saving_leaves_an_intact_checkpoint(run, monkeypatch):
    content = checkpoint.load(run) | {"update": 6}

    class Death(BaseException):
        pass

    for name in ("fsync", "replace", "unlink"):

        def die(*arguments, **keywords):
            raise Death

        with monkeypatch.context() as patch:
            patch.setattr(os, name, die)
            with pytest.raises(Death):
                save(run, content)
        assert checkpoint.load(run)["update"] in (4, 6)


def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(run):
    newest = run / "checkpoint_4.pt"
    newest.unlink()
    newest.mkdir()  # a file without permission would be readable to root
    with pytest.raises(OSError, match="checkpoint_4.pt cannot be read .Is a directory.$"):
        checkpoint.load(run)


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_checkpoint(run):
    part = run / "checkpoint_5.pt.part"
    part.write_bytes(b"half")
    save(run, checkpoint.load(run) | {"update": 6})
    assert not part.exists()


def with_layers(change):
    """Content whose memories are others."""

    def changed(content):
        streams = content["streams"][0]
        memories = [part | {"layers": change(part["layers"])} for part in streams["memories"]]
        return content | {"streams": [streams | {"memories": memories}]}

    return changed


CHANGES = {
    **{f"no {name}": lambda content, name=name: {k: v for k, v in content.items() if k != name}
       for name in checkpoint.ENTRY_TYPES},
    **{f"{name} of another type": lambda content, name=name: content | {name: 2.5} for name in checkpoint.ENTRY_TYPES},
    "a list": lambda content: list(content),
    "another format": lambda content: content | {"format": 99},
    "one layer less": with_layers(lambda layers: layers[:1]),
    "no layers": with_layers(lambda layers: []),
    "a layer that is a number": with_layers(lambda layers: [3, 3]),
    "memories of another width": with_layers(lambda layers: [(hidden[:, 1:], *rest) for hidden, *rest in layers]),
    "memories beyond their end": with_layers(lambda layers: [(*rest, offsets * 2) for *rest, offsets in layers]),
    "memories of fewer streams": with_layers(lambda layers: [(*rest, offsets[:-1]) for *rest, offsets in layers]),
    "no streams": lambda content: content | {"streams": []},
    "streams that are numbers": lambda content: content | {"streams": [3]},
    "weights that are numbers": lambda content: content | {"model": dict.fromkeys(content["model"], 1)},
    "a weight less": lambda content: content | {"model": dict(list(content["model"].items())[1:])},
    "an empty optimizer": lambda content: content | {"optimizer": {}},
    "an empty objective": lambda content: content | {"objective": {}},
    "an objective without stream": lambda content: content | {"objective": {"blocks": 1, "stream": 5}},
    "an empty random state": lambda content: content
    | {"streams": [content["streams"][0] | {"rng": torch.zeros(3)}]},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_with_other_content_is_refused_in_one_line(change, run):
    content = CHANGES[change](checkpoint.load(run))
    path = run / "checkpoint_4.pt"
    with open(path, "w+b") as file:
        torch.save(content, file)
        file.write(checkpoint.sha256(file, file.tell()))
    with pytest.raises(ValueError, match="checkpoint") as refusal:
        resumed_update(run)
    assert "\n" not in str(refusal.value)


def test_as_many_checkpoints_are_kept_as_the_config_says(tmp_path):
    train(tiny_config("train.updates=5", "run.checkpoint_every=1", "run.keep_checkpoints=3"), tmp_path)
    assert [path.name for path in checkpoint.paths(tmp_path)] == [f"checkpoint_{update}.pt" for update in (5, 4, 3)]


# Weights


def test_a_folder_with_config_and_weights_alone_is_evaluated_like_the_run(run):
    expected = read_metrics(run / "metrics.jsonl")[-1]
    for path in run.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    evaluated = evaluate_run(tiny_config(), run, run)
    assert evaluated["test/loss"] == expected["test/loss"]
    assert load_run(run, tiny_config()).update == 4


def test_the_weights_of_the_last_checkpoint_lie_beside_it_for_other_programs(run):
    expected = checkpoint.load(run)["model"]
    weights_of_file = load_file(run / "model.safetensors")
    assert expected.keys() == weights_of_file.keys()
    assert all(torch.equal(weights_of_file[name], weight) for name, weight in expected.items())


def test_a_flipped_bit_in_the_weights_is_found_and_those_of_the_checkpoint_are_used(run, caplog):
    path = run / "model.safetensors"
    size, whole = path.stat().st_size, path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    bits = [random.Random(2).randrange(8 * size) for _ in range(30)]
    bits += [random.Random(3).randrange(8 * (8 + header)) for _ in range(30)]
    for bit in bits:
        flip_bit(path, bit)
        with pytest.raises(ValueError, match="is damaged"):
            weights.load(path)
        path.write_bytes(whole)
    flip_bit(path, bits[0])
    assert load_run(run, tiny_config()).update == 4
    assert "the weights of the checkpoint are used" in caplog.text


@pytest.mark.parametrize("task", ["copy", "corridor"])  # an accuracy, and a metric of environments
def test_the_best_weights_by_validation_are_kept_and_can_be_evaluated(task, tmp_path):
    shrunk = ["train.updates=8", "eval.interval=1", "eval.max_blocks=4", "eval.splits=[valid]"]
    train(tiny_config(*shrunk, task=task), tmp_path)
    name = "valid/accuracy" if task == "copy" else "valid/rl/success"
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl")[:-1] if name in row]
    best = max(rows, key=lambda row: row[name])  # the first of equals
    loaded = weights.load(tmp_path / "best.safetensors")
    assert (loaded.update, loaded.value) == (best["update"], best[name])
    best_config = tiny_config(*shrunk, "eval.weights=best", task=task)
    assert evaluate_run(best_config, tmp_path, tmp_path)[name] == best[name]


def test_the_best_weights_of_a_task_with_an_error_have_the_lowest(tmp_path):
    trainer = Trainer(tiny_config(task="collision"), tmp_path)
    for update, error in enumerate([0.5, 0.3, 0.4, math.nan, 0.3]):
        trainer.update = update
        trainer.save_if_best({"valid/error": error})
    assert weights.load(tmp_path / "best.safetensors").update == 1
    flip_bit(tmp_path / "best.safetensors", 99_999)
    trainer.save_if_best({"valid/error": 0.9})
    assert weights.load(tmp_path / "best.safetensors").value == 0.9


def test_the_best_weights_are_refused_where_there_are_none(run):
    with pytest.raises(FileNotFoundError, match="best.safetensors does not exist: only a run with eval.interval=N"):
        load_run(run, tiny_config("eval.weights=best"))
    with pytest.raises(ValueError, match="eval.weights=best is for evaluate=RUN"):
        Trainer(tiny_config("eval.weights=best"), run)


def test_an_evaluation_that_fails_leaves_nothing_that_looks_like_a_run(run, tmp_path):
    (run / "best.safetensors").write_bytes(b"no weights")
    (evaluated := tmp_path / "evaluated").mkdir()
    with pytest.raises(ValueError, match="best.safetensors is damaged"):
        evaluate_run(tiny_config("eval.weights=best"), run, evaluated, config_files={".hydra/config.yaml": "{}"})
    assert not list(evaluated.iterdir())


# A training that diverges


@pytest.mark.parametrize("rate", ["1e10", "1e38"])  # weights that are far too large, and infinite ones
@pytest.mark.parametrize("task", ["copy", "corridor"])
def test_a_diverged_training_goes_on_from_the_checkpoint_that_it_names_with_a_good_rate(rate, task, tmp_path):
    blocks = 8 if task == "copy" else 2
    sgd = ["optimizer._target_=torch.optim.SGD", "train.grad_clip=null", "lr_schedule.warmup_updates=0"]
    overrides = ["train.updates=12", "run.checkpoint_every=1", "run.log_every=1", f"eval.max_blocks={blocks}", *sgd]
    good = [*overrides, "optimizer.lr=1e-3"]
    short = [*good, "train.updates=2"]
    train(tiny_config(*short, task=task), tmp_path)
    with pytest.raises(ValueError, match="the last good checkpoint is that of update") as refusal:
        train(tiny_config(*overrides, f"optimizer.lr={rate}", task=task), tmp_path, changeable=MAY_CHANGE_IN_RESUME)
    update = int(re.search(r"that of update (\d+)", str(refusal.value))[1])
    assert checkpoint.load(tmp_path)["update"] == update
    assert all(weight.isfinite().all() for weight in checkpoint.load(tmp_path)["model"].values())
    metrics = train(tiny_config(*good, task=task), tmp_path, changeable=MAY_CHANGE_IN_RESUME)
    assert all(math.isfinite(value) for value in metrics.values())


def test_weights_that_are_no_longer_finite_after_the_last_update_end_the_run_with_an_error(tmp_path):
    trainer = Trainer(tiny_config("train.updates=1"), tmp_path)
    train_step(trainer)
    with torch.no_grad():
        trainer.model.position[0, 0] = math.inf  # the loss and the gradient norm were still finite
    with pytest.raises(ValueError, match="no longer finite after update 1; .*nothing has been saved"):
        trainer.save_checkpoint()


def test_actions_that_cannot_be_sampled_are_reported_as_divergence(tmp_path):
    trainer = Trainer(tiny_config(task="corridor"), tmp_path)
    with torch.no_grad():
        trainer.model.output_head.weight.fill_(3e38)  # finite, but no more than that
    with pytest.raises(ValueError, match="test: no action can be sampled; the weights have diverged"):
        evaluate(trainer, "test")


def test_a_final_evaluation_that_is_not_a_number_ends_the_run_with_an_error(tmp_path):
    trainer = Trainer(tiny_config(), tmp_path)
    with torch.no_grad():
        trainer.model.output_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="test/loss is nan: the weights have diverged"):
        evaluate(trainer, "test")
