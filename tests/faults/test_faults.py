"""Whatever kills a run, it goes on to the same result, bit for bit; what cannot go on says so in one line.

`make test-faults` runs this, and prints how many cases of each kind there were.
"""

import random
import shutil
import signal

import pytest
from forked_run import DIED, differences, forked_run, result
from tiny_config import SMALL_TASKS, config_options, tiny_config

from expire_span.runner.run_folder import checkpoint
from expire_span.runner.train import train

pytestmark = pytest.mark.faults
MODELS = config_options("model")
TASKS = [*SMALL_TASKS, "text"]
PAIRS = [(task, model) for task in TASKS for model in MODELS]
# Each task with one model and each model with a task: for what is done at every place of a run.
SOME_PAIRS = [(task, MODELS[number % len(MODELS)]) for number, task in enumerate(TASKS)]
TIMES = {signal.SIGKILL: 2, signal.SIGTERM: 2, signal.SIGINT: 1, signal.SIGHUP: 1}  # of each pair
TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles. " for number in range(300))
OVERRIDES = ["train.updates=6", "run.log_every=3", "run.checkpoint_every=2", "eval.interval=2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A function that gives the config, the folder, the result and the end of the uninterrupted run of a pair."""
    runs = {}

    def run(task, model):
        if (task, model) not in runs:
            base = tmp_path_factory.mktemp(f"{task}-{model}")
            text = base / "text.txt"
            text.write_text(TEXT)
            blocks = "eval.max_blocks=2" if task in ("corridor", "portal") else "eval.max_blocks=16"
            overrides = [f"model={model}", "transformer.dropout=0.1", blocks, *OVERRIDES]
            config = tiny_config(*overrides, task=task, text=text)
            (base / "here").mkdir()
            train(config, base / "here")  # in this process, so that every forked one has what it loads and compiles
            end = forked_run(config, base / "uninterrupted")
            assert end.code == 0, end.message
            assert not differences(result(base / "here"), result(base / "uninterrupted"))
            runs[task, model] = config, base / "uninterrupted", result(base / "uninterrupted"), end
        return runs[task, model]

    return run


def assert_goes_on_exactly(config, folder, expected):
    end = forked_run(config, folder)
    assert end.code == 0, end.message
    assert not differences(expected, result(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize(("task", "model"), PAIRS)
def test_a_run_that_gets_a_signal_at_any_moment_goes_on_exactly(task, model, uninterrupted, count, tmp_path):
    config, _, expected, whole = uninterrupted(task, model)
    moments = random.Random(f"{task} {model}")
    for number in [number for number, times in TIMES.items() for _ in range(times)]:
        folder = tmp_path / "run"
        end = forked_run(config, folder, kill=number, delay=moments.random() * whole.seconds)
        allowed = -number if number == signal.SIGKILL else 128 + number
        assert end.code in (allowed, 0), (number, end.message)
        if end.code > 0:
            saved = checkpoint.paths(folder)
            promise = f"update {checkpoint.update_of(saved[0])} is saved" if saved else "nothing is saved yet"
            assert promise in end.message
        assert_goes_on_exactly(config, folder, expected)
        count(number.name, "exact" if end.code else "exact, finished before the signal")


@pytest.mark.parametrize(("task", "model"), SOME_PAIRS)
def test_a_run_that_dies_at_any_file_operation_goes_on_exactly(task, model, uninterrupted, count, tmp_path):
    config, _, expected, _ = uninterrupted(task, model)
    for operation in range(1000):
        end = forked_run(config, tmp_path / "run", die_at=operation)
        if end.code == 0:  # it has no more operations than this
            break
        assert end.code == DIED, (operation, end.message)
        assert_goes_on_exactly(config, tmp_path / "run", expected)
        count("death at a file operation", "exact")
    assert operation > 50


def flip(content, moments):
    bit = moments.randrange(8 * len(content))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda content, moments: content[: moments.randrange(len(content))],
    "zeroed": lambda content, moments: bytes(len(content)),
    "zeroed part": lambda content, moments: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "empty": lambda content, moments: b"",
}


@pytest.mark.parametrize(("task", "model"), SOME_PAIRS)
def test_a_run_whose_files_are_damaged_goes_on_exactly_or_says_so(task, model, uninterrupted, count, tmp_path):
    config, finished, expected, _ = uninterrupted(task, model)
    moments = random.Random(f"{task} {model}")
    for kind, times in {"flipped bit": 4, **dict.fromkeys(list(DAMAGE)[1:], 1)}.items():
        for files in ([0], [0, 1]):  # the newest checkpoint, or both
            for _ in range(times if files == [0] else 1):
                folder = shutil.copytree(finished, tmp_path / "run")
                for path in [checkpoint.paths(folder)[index] for index in files]:
                    path.write_bytes(DAMAGE[kind](path.read_bytes(), moments))
                for path in folder.glob("*.safetensors"):
                    path.write_bytes(DAMAGE[kind](path.read_bytes(), moments))
                if files == [0]:
                    (folder / "best.safetensors").write_bytes((finished / "best.safetensors").read_bytes())
                    assert_goes_on_exactly(config, folder, expected)
                    count(kind, "exact")
                else:
                    end = forked_run(config, folder)
                    assert (end.code, len(end.message.splitlines())) == (1, 1), end.message
                    assert "no checkpoint" in end.message
                    count(kind, "refused in one line")
                    shutil.rmtree(folder)


@pytest.mark.parametrize(("task", "model"), SOME_PAIRS)
def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_exactly(task, model, uninterrupted, count, tmp_path):
    config, finished, expected, _ = uninterrupted(task, model)
    largest = max(path.stat().st_size for path in finished.iterdir() if path.is_file())
    moments = random.Random(f"{task} {model}")
    for size in [0, 1, *(moments.randrange(largest) for _ in range(3)), largest - 1]:
        end = forked_run(config, tmp_path / "run", max_file_size=size)
        assert (end.code, len(end.message.splitlines())) == (1, 1), (size, end.message)
        assert "could not be written" in end.message
        count("full disk", "one line, then exact")
        assert_goes_on_exactly(config, tmp_path / "run", expected)
