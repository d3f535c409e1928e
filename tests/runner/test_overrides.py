"""Overrides are read by one grammar, Hydra's, whoever reads them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from expire_span.runner.config.overrides import (
    apply_overrides,
    file_name,
    free_folder,
    literal,
    parse,
    quote,
    quote_text,
    sweep_folder_name,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.sampled_from(list("ab'\\${}=,( #[~\"/")), max_size=12))
def test_a_quoted_value_is_read_as_exactly_its_text(text):
    if "\\$" in text:  # which would need OmegaConf's own escapes; no path of ours has them
        return
    assert OmegaConf.create({"key": parse(f"key={quote(text)}").value()}).key == text


def test_paths_from_the_home_folder_and_run_folders_with_odd_names_are_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse(quote_text("task.path=~/a,b.txt")).value() == "/home/someone/a,b.txt"
    assert quote_text("~train.grad_clip") == "~train.grad_clip"
    run = tmp_path / "it's (1) = ${run}"
    run.mkdir()
    assert OmegaConf.create([parse(quote_text(f"resume={run}")).value()])[0] == str(run)
    assert quote_text("resume=runs/a-1") == "resume=runs/a-1"


@pytest.mark.parametrize("name", ["1e3", "12e4", "007", "1_000", "20251125", "-1", ".5", "nan", "true", "2025-11-25"])
def test_a_name_that_looks_like_a_number_is_used_as_it_was_typed(name):
    for key in ("evaluate", "task.path", "wandb.project", "++wandb.group"):
        assert parse(quote_text(f"{key}={name}")).value() == name
    assert quote_text(f"optimizer.lr={name}") == f"optimizer.lr={name}"


def test_overrides_of_a_run_take_references_from_its_own_config():
    config = DictConfig({"train": {"batch_size": 64}, "eval": {"batch_size": 1}, "evaluate": None})
    apply_overrides(config, ["evaluate=run", "eval.batch_size=${train.batch_size}"], "evaluate", ["eval"])
    assert config.eval.batch_size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=8", "evaluate=RUN keeps the run's own train.batch_size; omit train.batch_size=8"),
        ("memory.max_span=8", "keeps the run's own memory.max_span; .*eval.span_cap caps every span"),
        ("task=copy", "evaluate=RUN takes task from the run itself; omit task=copy"),
        ("eval.speed=3", "eval.speed is not in the config"),
        ("~eval.batch_size", "one value each"),
        ("eval.batch_size=1,2", "one value each"),
    ],
)
def test_an_override_that_a_run_cannot_take_is_refused(override, message):
    config = DictConfig({"train": {"batch_size": 64}, "eval": {"batch_size": 1}, "memory": {"max_span": 9}})
    with pytest.raises(ValueError, match=message):
        apply_overrides(config, [override], "evaluate", ["eval"])
    apply_overrides(config, ["train.batch_size=64"], "evaluate", ["eval"])  # the run's own value may be said again


def test_the_folders_of_a_sweep_are_told_apart_by_the_swept_values_alone():
    overrides = ["model=a,b", "seed=1,2", "memory.alpha=1e-6,1e-5", "size=mini", "hydra.launcher.n_jobs=1,2"]
    name = sweep_folder_name(overrides)
    assert name.endswith("-seed${seed}-alpha=${file_name:${memory.alpha}}")
    assert sweep_folder_name(["model=a"]) is None


def test_different_values_have_different_names_that_a_file_system_takes():
    values = ["1e-06", "a/b", "a b", "a_b", "x" * 300, "x" * 301, "[1, 2]"]
    names = [file_name(value) for value in values]
    assert len(set(names)) == len(values)
    assert all(len(name) < 70 and "/" not in name for name in names)


def test_two_starts_in_the_same_second_get_folders_of_their_own(tmp_path):
    names = [Path(free_folder(f"{tmp_path}/runs/12-00-00-copy")).name for _ in range(3)]
    assert names == ["12-00-00-copy", "12-00-00-copy-2", "12-00-00-copy-3"]


def test_literal_text_is_not_resolved():
    assert DictConfig(literal({"a": ["${oc.env:HOME}"]})).a[0] == "${oc.env:HOME}"
