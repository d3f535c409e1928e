"""Milestones: a run of an unmodified recipe says what to expect, and once where it falls far behind."""

from importlib.resources import files
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tiny_config import compose_config, tiny_config

from expire_span.runner.config.schema import validate
from expire_span.runner.milestones import PERCENTAGES, far_behind, is_plain_recipe
from expire_span.runner.run_folder.files import read_summary
from expire_span.runner.train import train

RECIPES = sorted(
    path for path in (files("expire_span.conf") / "recipe").glob("*/*.yaml") if "milestones" in path.read_text()
)


def config_with(milestones, num_updates=100):
    return OmegaConf.create({"milestones": milestones, "train": {"updates": num_updates}})


def rows_of(metric, values, interval=5):
    return [{"update": interval * number, metric: value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("metric", "value", "is_behind"),
    [("accuracy", 0.5, True), ("accuracy", 0.55, False), ("error", 1.25, True), ("error", 1.15, False)],
)
def test_a_run_is_far_behind_where_it_is_more_than_a_third_worse(metric, value, is_behind):
    task = SimpleNamespace(metric=metric)
    rows = rows_of(f"train/{metric}", [value] * 2)
    messages = far_behind(config_with({10: 0.8}), task, rows)
    assert messages == [f"train/{metric} is {value:g} at update 10, where this recipe had 0.8"] * is_behind


def test_one_bad_interval_and_what_comes_after_a_milestone_do_not_count():
    task, config = SimpleNamespace(metric="accuracy"), config_with({50: 0.8})
    values = [0.0] * 8 + [0.3, 0.9]  # the last two make up the tenth that ends at update 50
    assert far_behind(config, task, rows_of("train/accuracy", values)) == []
    assert far_behind(config, task, rows_of("train/accuracy", [*values, 0.0, 0.0])) == []


def test_a_milestone_is_told_once_and_not_before_its_update():
    task, config = SimpleNamespace(metric="accuracy"), config_with({50: 0.8})
    rows = rows_of("train/accuracy", [0.1] * 20, interval=4)  # update 50 lies between two logs
    told = [len(far_behind(config, task, rows[: end + 1], since=4 * end)) for end in range(20)]
    assert told == [int(4 * (end + 1) == 52) for end in range(20)]


@pytest.mark.parametrize(
    ("overrides", "is_plain"),
    [
        ("task=copy size=mini", True),
        ("model=expire_span seed=3 task.seed=3 run.num_threads=1 wandb.mode=disabled eval.interval=10", True),
        ("train.micro_batch_size=4 hydra.run.dir=there hydra/launcher=processes", True),
        ("task=copy optimizer.lr=1e-3", False),
        ("+optimizer.betas=[0.9,0.99]", False),
        ("memory.budget=40", False),
        ("train.updates=100", False),
        ("task.episode_length=512", False),
        ("model=trans_xl", False),
        ("recipe=copy/mini", False),
        ("experiment=mini/table1_expire_span_128k wandb.group=mini", True),  # which is the recipe
        ("experiment=mini/figure4_corridor_expire_span", True),
        ("experiment=mini/table1_expire_span_16k", False),  # with another max_span
        ("experiment=mini/table1_expire_span_128k memory.max_span=64", False),
        ("experiment=mini/figure4_corridor_trans_xl_20", False),
    ],
)
def test_only_an_unmodified_recipe_has_milestones(overrides, is_plain):
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        composed = compose("config", overrides=overrides.split(), return_hydra_config=True)
    assert is_plain_recipe(overrides.split(), composed.hydra.runtime.choices, ["pkg://expire_span.conf"]) == is_plain


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_milestones_of_a_recipe_are_numbers_at_the_usual_percentages(path):
    milestones = yaml.safe_load(path.read_text())["milestones"]
    assert tuple(milestones) == PERCENTAGES
    config = validate(compose_config(f"task={path.parent.name}", f"size={path.stem}"))
    assert dict(config.milestones) == milestones


def test_a_run_says_what_to_expect_and_its_log_and_summary_where_it_is_behind(tmp_path, caplog):
    config = tiny_config("run.log_every=1", "train.updates=10", "eval.splits=[]")
    config.milestones = {50: 0.0, 100: 2.0}
    with caplog.at_level("INFO"):
        train(config, tmp_path)
    assert "train/accuracy should be about 0 at update 5, 2 at update 10" in caplog.messages
    behind = [message for message in caplog.messages if "where this recipe had" in message]
    assert len(behind) == 1
    assert behind[0].endswith("at update 10, where this recipe had 2")
    assert read_summary(tmp_path)["far_behind"] == behind
