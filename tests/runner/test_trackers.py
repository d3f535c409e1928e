"""Trackers show what metrics.jsonl holds, and spans, tables and pictures beside it; no run depends on them."""

import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_config import tiny_config

from expire_span.attention import soft_mask
from expire_span.runner.build import build_model
from expire_span.runner.logging.media import distance_tables, final_media, span_histograms, span_picture
from expire_span.runner.run_folder import weights
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train
from expire_span.runner.trainer import build_task

CPU = torch.device("cpu")


def events(folder):
    """What TensorBoard shows of a run."""
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def scalars(folder):
    """The points that TensorBoard shows, by the name of the metric."""
    shown = events(folder)
    return {name: [(point.step, point.value) for point in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def points(rows):
    """The same from rows of metrics.jsonl."""
    expected = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if name != "update":
                expected[name].append((row["update"], pytest.approx(value, rel=1e-6, nan_ok=True)))
    return expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracker=tensorbord", "tracker must be wandb, tensorboard or none, got tensorbord; did you mean tensorboard?"),
        ("tracker=[wandb,mlflow]", r"got mlflow; both are tracker=\[wandb,tensorboard\]"),
        ("tracker=null", "got null"),
        ("tracker=[wandb,none]", r"tracker=none stands alone, got \[wandb,none\]"),
    ],
)
def test_a_tracker_that_does_not_exist_is_refused_with_the_name_that_is_near(override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(override)


def test_with_tracker_none_wandb_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail, and be reported
    for override in ("tracker=none", "wandb.mode=disabled"):
        mode = "wandb.mode=offline" if override == "tracker=none" else "wandb.mode=disabled"
        (tmp_path / override).mkdir()
        assert "test/accuracy" in train(tiny_config(mode, override), tmp_path / override)
        assert not (tmp_path / override / "tensorboard").exists()


def test_without_tensorboard_a_run_that_asks_for_it_is_refused_before_it_begins(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"needs TensorBoard: pip install 'expire-span\[tensorboard\]'"):
        train(tiny_config("tracker=tensorboard"), folder)
    assert list(folder.iterdir()) == []


def test_one_tracker_that_fails_leaves_the_other_and_the_run_alone(folder, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tiny_config("wandb.mode=online", "tracker=[wandb,tensorboard]"), folder)
    assert caplog.text.count("W&B is off for this run") == 1
    assert scalars(folder) == points(read_metrics(folder / "metrics.jsonl"))


def test_tensorboard_shows_every_row_once_after_a_kill(folder):
    config = tiny_config("tracker=tensorboard", "train.updates=6", "run.checkpoint_every=4", "run.log_every=1")
    train(config, folder)
    (folder / "checkpoint_6.pt").unlink()  # as if it had been killed after update 6, with a checkpoint of update 4
    train(config, folder)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert scalars(folder) == points(rows)


def test_tensorboard_that_is_asked_for_later_gets_the_earlier_rows(folder):
    train(tiny_config(), folder)
    train(tiny_config("tracker=tensorboard", "train.updates=6"), folder)
    assert scalars(folder) == points(read_metrics(folder / "metrics.jsonl"))


@pytest.fixture(scope="module", params=["expire_span", "adaptive_span"])
def shown(request, tmp_path_factory):
    """A run with TensorBoard, and the same without."""
    folder, without = tmp_path_factory.mktemp("shown"), tmp_path_factory.mktemp("without")
    overrides = [f"model={request.param}", "lr_schedule.span_lr_factor=1000"]
    train(tiny_config(*overrides, "tracker=tensorboard"), folder)
    train(tiny_config(*overrides), without)
    return folder, without


def test_a_tracker_changes_no_weight(shown):
    tracked, untracked = (weights.load(folder / "model.safetensors").tensors for folder in shown)
    assert all(torch.equal(tracked[name], untracked[name]) for name in untracked)


def test_histograms_table_and_picture_are_shown_beside_the_metrics_and_not_in_the_file(shown):
    folder, _ = shown
    tags = events(folder).Tags()
    assert tags["histograms"] == ["spans/layer_0", "spans/layer_1"]
    assert tags["images"] == ["test/spans"]
    assert set(tags["tensors"]) == {f"{split}/accuracy_by_distance/text_summary" for split in ("valid", "test")}
    assert [point.step for point in events(folder).Histograms("spans/layer_0")] == [2, 4]  # run.log_every
    names = {name for row in read_metrics(folder / "metrics.jsonl") for name in row}
    assert not [name for name in names if name.startswith("spans/") or name in tags["images"]]


def model_and_state(config):
    """A model that has read some blocks."""
    task = build_task(config)
    model = build_model(config, task, CPU)
    for layer in model.layers:
        torch.nn.init.normal_(layer.mechanism.weight, std=2.0)  # so that spans differ
    state = model.initial_state(4)
    with torch.no_grad():
        for batch, _ in zip(task.stream("train", 4, 16), range(3), strict=False):
            _, state, _ = model(batch.tokens, state)
    return task, model, state


def test_a_histogram_has_the_spans_by_which_the_memories_are_held(monkeypatch):
    _, model, state = model_and_state(tiny_config("run.num_threads=1"))
    for layer, memory, spans in zip(
        model.layers, state["layers"], span_histograms(model, state, CPU).values(), strict=True
    ):
        assert len(spans) == len(memory.time)
        assert (soft_mask(state["step"] - memory.time, spans, layer.mechanism.ramp) > 0).all()
        assert len(spans.unique()) > 1
    monkeypatch.setattr("expire_span.runner.logging.media.MEMORIES_PER_HISTOGRAM", 10)
    assert all(5 <= len(spans) <= 10 for spans in span_histograms(model, state, CPU).values())


def test_a_layer_without_memories_has_no_histogram():
    _, model, _ = model_and_state(tiny_config())
    assert span_histograms(model, model.initial_state(4), CPU) == {}


def test_the_table_has_a_row_for_each_distance():
    metrics = {"test/accuracy": 0.5, "test/accuracy_distance_0_2": 1.0, "test/accuracy_distance_2_4": 0.25}
    [(name, table)] = distance_tables(metrics).items()
    assert name == "test/accuracy_by_distance"
    assert table == (("distance from", "to", "accuracy"), [(0, 2, 1.0), (2, 4, 0.25)])


def test_the_picture_is_that_of_the_test_split_or_else_of_what_is_evaluated():
    for splits, name in (("[valid,test]", "test/spans"), ("[valid]", "valid/spans")):
        config = tiny_config(f"eval.splits={splits}")
        task, model, _ = model_and_state(config)
        [(shown_name, picture)] = span_picture(model, task, config, CPU).items()
        assert shown_name == name
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert len(np.unique(picture)) > 10


def test_without_matplotlib_there_is_no_picture_and_no_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    config = tiny_config()
    task, model, _ = model_and_state(config)
    assert list(final_media(model, task, config, CPU, {"test/accuracy_distance_0_2": 1.0})) == [
        "test/accuracy_by_distance"
    ]


def test_histograms_and_a_picture_that_fail_cost_one_warning(folder, monkeypatch, caplog):
    def fail(*arguments):
        raise MemoryError("too large")

    monkeypatch.setattr("expire_span.runner.logging.media.map_rows", fail)
    monkeypatch.setattr("expire_span.runner.logging.media.spans_over_time", fail)
    train(tiny_config("tracker=tensorboard"), folder)
    assert caplog.text.count("no histogram, table or picture beside the metrics (too large)") == 1
    assert scalars(folder) == points(read_metrics(folder / "metrics.jsonl"))
