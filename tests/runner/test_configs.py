"""Every config of the project composes, builds and takes two steps; its keys are written down."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import TASKS, composed, tiny

from expire_span import TransformerConfig
from expire_span.runner.loop import train
from expire_span.runner.settings import checked

CONF = files("expire_span.conf")
KEYS = Path(__file__).parents[1] / "expected" / "config_keys.txt"


def options(group):
    return sorted(each.name.removesuffix(".yaml") for each in (CONF / group).iterdir() if each.name.endswith(".yaml"))


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def steps(config, folder):
    folder.mkdir()
    figures = train(config, folder)
    assert math.isfinite(figures.get("test/loss", 0.0))  # none where the model acts
    assert figures["test/memory/size"] > 0


@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("task", [*TASKS, "text"])
def test_every_model_takes_two_steps_on_every_task(task, model, tmp_path, text):
    steps(tiny(f"model={model}", "train.updates=2", task=task, text=text), tmp_path / "run")


@pytest.mark.parametrize("size", options("size"))
@pytest.mark.parametrize("task", options("task"))
def test_every_task_composes_at_every_size(task, size):
    config = checked(composed(f"task={task}", f"size={size}", *(["task.path=x"] if task == "text" else [])))
    TransformerConfig(vocabulary=2, **{key: value for key, value in config.transformer.items() if key != "layers"})
    assert instantiate(config.model).max_span == config.memory.max_span


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_takes_two_steps_when_shrunk(experiment, tmp_path, text):
    full = checked(composed(f"experiment={experiment}"))
    task = full.task["_target_"].split(".")[-2]
    task = task if task in TASKS else "text"  # without the download
    smaller = ["model.max_span=32", "model.compressed=4"] if "compressed" in full.model else []
    steps(tiny(f"experiment={experiment}", "train.updates=2", *smaller, task=task, text=text), tmp_path / "run")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_tells_its_command_and_the_paper_s_figure(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"\n# expire-span experiment={experiment}     (paper: " in text


def test_the_rows_of_every_table_are_there():
    rows = {table: sum(each.startswith(f"table{table}_") for each in options("experiment")) for table in range(1, 7)}
    assert rows == {1: 3, 2: 2, 3: 6, 4: 8, 5: 1, 6: 4}  # of table 4; its three of collision are table 3's


def keys(node, prefix=""):
    for key, value in sorted(node.items()):
        yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def test_the_keys_of_the_config_are_these():
    written = KEYS.read_text().splitlines()
    assert list(keys(OmegaConf.to_container(composed()))) == written, "if a change of keys is meant, change the list"
