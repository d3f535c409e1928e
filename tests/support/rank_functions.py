"""What the ranks of a test do: functions that their processes, which do not know the tests, can import."""

import resource
import signal

import pytest
from tiny_config import tiny_config

from expire_span.runner.cli import lock_by_main
from expire_span.runner.train import interval_metrics, train, train_step
from expire_span.runner.trainer import Trainer


def train_as_rank(rank, config, folder):
    return train(config, folder)


def train_until(rank, config, folder, update):
    """The losses of the updates up to this one, from the folder's checkpoint, which is replaced."""
    trainer = Trainer(config, folder)
    trainer.load_checkpoint()
    losses = []
    while trainer.update < update:
        train_step(trainer)
        losses.append(interval_metrics(trainer)["train/loss"])
    trainer.save_checkpoint()
    return losses


def messages_of_training(rank, configs, folder):
    """What trainings raise, one after another."""
    messages = []
    for config in configs:
        with pytest.raises(ValueError, match=r".") as refusal:
            train(config, folder)
        messages.append(str(refusal.value))
    return messages


def message_of_full_disk(rank, config, longer, folder):
    """What going on with a run raises, where rank 1 can write no more."""
    train(config, folder)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match=r".") as failure:
        train(longer, folder)
    return str(failure.value)


def message_of_lock(rank, folder):
    """What locking the folder raises, where rank 1 looks for it on another disk."""
    path = folder / "a" if rank == 0 else folder / "missing" / ".." / "a"
    path.mkdir() if rank == 0 else None
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(type(path), "absolute", lambda self: "the same name")
    with monkeypatch.context(), pytest.raises(ValueError, match=r".") as refusal, lock_by_main(path, tiny_config()):
        pass
    return str(refusal.value)
