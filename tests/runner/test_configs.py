"""Every config of the project composes, builds and trains for two updates; its keys are written down."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_config import OF_THE_PAPER, SMALL_TASKS, compose_config, config_options, tiny_config

from expire_span import TransformerConfig
from expire_span.runner.config.schema import validate
from expire_span.runner.train import train

CONF = files("expire_span.conf")
SHORT = ["train.updates=2", "eval.splits=[test]", "eval.max_blocks=4"]
KEYS_PATH = Path(__file__).parents[1] / "expected" / "config_keys.txt"
ROWS_OF_TABLE = {1: 3, 2: 2, 3: 6, 4: 8, 5: 1, 6: 4}  # the three rows of collision in table 4 are table 3's


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return path


def assert_trains(config, folder):
    folder.mkdir()
    metrics = train(config, folder)
    assert math.isfinite(metrics.get("test/loss", 0.0))  # there is none where the model acts
    assert metrics["test/memory/size"] > 0
    return metrics


@pytest.mark.parametrize(
    ("task", "model"),
    [
        pytest.param(task, model, marks=() if model in OF_THE_PAPER or task == "copy" else pytest.mark.slow)
        for task in [*SMALL_TASKS, "text"]
        for model in config_options("model")
    ],
)
def test_every_model_trains_on_every_task(task, model, tmp_path, text):
    metrics = assert_trains(tiny_config(f"model={model}", *SHORT, task=task, text=text), tmp_path / "run")
    if task in ("copy", "collision", "collision_easy", "corridor"):  # those that know how far back an answer lies
        assert 0 <= metrics["test/beyond_reach"] < 1


@pytest.mark.parametrize("size", config_options("size"))
@pytest.mark.parametrize("task", config_options("task"))
def test_every_task_composes_at_every_size(task, size):
    needed = {"text": ["task.path=x"], "gymnasium": ["task.id=x"]}.get(task, [])
    config = validate(compose_config(f"task={task}", f"size={size}", *needed))
    sizes = {key: value for key, value in config.transformer.items() if key != "num_layers"}
    TransformerConfig(vocab_size=2, **sizes)
    assert instantiate(config.model).max_span == config.memory.max_span


@pytest.mark.slow
@pytest.mark.parametrize("experiment", config_options("experiment"))
def test_every_experiment_trains_when_shrunk(experiment, tmp_path, text):
    config = validate(compose_config(f"experiment={experiment}"))
    task = config.task["_target_"].split(".")[-2]
    task = task if task in SMALL_TASKS else "text"  # in place of tasks that download
    smaller = ["model.max_span=32", *(["model.compressed_size=4"] if "compressed_size" in config.model else [])]
    overrides = [f"experiment={experiment}", *SHORT, *smaller]
    assert_trains(tiny_config(*overrides, task=task, text=text), tmp_path / "run")


@pytest.mark.parametrize("experiment", config_options("experiment"))
def test_every_experiment_names_its_command_and_the_papers_result(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"# expire-span experiment={experiment}\n" in text
    paper = compose_config(f"experiment={experiment}").paper
    assert all(name.startswith(("test/", "perf/")) and value > 0 for name, value in paper.items())
    assert paper or "without numbers" in text


def test_every_row_of_the_papers_tables_has_an_experiment():
    experiments = config_options("experiment")
    rows = {table: sum(name.startswith(f"table{table}_") for name in experiments) for table in ROWS_OF_TABLE}
    assert rows == ROWS_OF_TABLE


def dotted_keys(node, prefix=""):
    for key, value in sorted(node.items()):
        yield from dotted_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [f"{prefix}{key}"]


def test_the_keys_of_the_config_are_those_written_down():
    expected = KEYS_PATH.read_text().splitlines()
    keys = list(dotted_keys(OmegaConf.to_container(compose_config())))
    assert keys == expected, "if the change of keys is intended, change the list, and add old ones to former_names.py"
