"""Checkpoints: damage is found, the one before is used, and what is no checkpoint is refused in one line."""

import os
import random
import shutil

import pytest
import torch
from tiny_config import tiny_config

from expire_span.runner.run_folder import checkpoint
from expire_span.runner.train import train
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


def test_a_damaged_checkpoint_never_takes_the_place_of_an_intact_one(run):
    """Even if the run that goes on from the intact one dies at any step of saving its next checkpoint."""
    flip_bit(run / "checkpoint_4.pt", 80_000)
    content = checkpoint.load(run)
    for update in (3, 5):  # before and after the damaged one
        copy = shutil.copytree(run, run.parent / f"saved at {update}")
        checkpoint.save(copy, content | {"update": update})
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
                checkpoint.save(run, content)
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
    checkpoint.save(run, checkpoint.load(run) | {"update": 6})
    assert not part.exists()


def changed(content, **changes):
    return content | changes


CHANGES = {
    **{f"no {name}": lambda content, name=name: {k: v for k, v in content.items() if k != name}
       for name in checkpoint.ENTRY_TYPES},
    **{f"{name} of another type": lambda content, name=name: content | {name: 2.5} for name in checkpoint.ENTRY_TYPES},
    "a list": lambda content: list(content),
    "another format": lambda content: content | {"format": 99},
    "one layer less": lambda content: content | {"layers": content["layers"][:1]},
    "no layers": lambda content: content | {"layers": []},
    "a layer that is a number": lambda content: content | {"layers": [3, 3]},
    "memories of another width": lambda content: content
    | {"layers": [(hidden[:, 1:], *rest) for hidden, *rest in content["layers"]]},
    "memories beyond their end": lambda content: content
    | {"layers": [(*rest, offsets * 2) for *rest, offsets in content["layers"]]},
    "weights that are numbers": lambda content: content | {"model": dict.fromkeys(content["model"], 1)},
    "a weight less": lambda content: content | {"model": dict(list(content["model"].items())[1:])},
    "an empty optimizer": lambda content: content | {"optimizer": {}},
    "an empty objective": lambda content: content | {"objective": {}},
    "an objective without stream": lambda content: content | {"objective": {"blocks": 1, "stream": 5}},
    "an empty random state": lambda content: content | {"rng": torch.zeros(3)},
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
