"""Tuning for the paper's tables: every model has the same budget, and the validation split decides."""

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_config import config_options
from tiny_tables import LONG, all_rows, preset_row, table_of

from expire_span.paper_rows import preset_content, row_config
from expire_span.paper_sweeps import sweeps
from expire_span.paper_tables import read_lines
from expire_span.paper_tuning import choose, describe, factors, model_option, points
from expire_span.runner.commands.paper import tuned_table
from expire_span.runner.config.schema import validate


@pytest.mark.parametrize("is_curve", [False, True])
def test_the_tuning_of_every_model_has_the_same_number_of_points(is_curve):
    numbers = set()
    for model in config_options("model"):
        of_model = factors(model, is_curve)
        assert all(1 in values for values in of_model.values())  # the row's own settings are among them
        number = 1
        for values in of_model.values():
            number *= len(values)
        numbers.add(number)
    assert len(numbers) == 1


def kind_of_settings(row):
    """What the tuned keys depend on: of Compressive also the task, whose blocks must fit its memory."""
    content = preset_content(row.overrides)
    of_compressive = content["defaults"] if model_option(row) == "compressive" else ""
    return model_option(row), row.is_curve, tuple(content.get("model", ())), str(of_compressive)


KINDS = {(size, kind_of_settings(row)): row for (size, _), row in all_rows().items()}


@pytest.mark.parametrize("row", KINDS.values(), ids=lambda row: row.preset)
def test_every_row_can_be_tuned_and_its_points_are_valid_settings(row):
    tried = points(row)
    configs = [validate(row_config(point.overrides)) for point in (tried[0], tried[-1])]
    assert len({str(point.overrides) for point in tried}) == len(tried)
    first, last = (
        {key: OmegaConf.select(config, key) for key in factors(model_option(row), row.is_curve)} for config in configs
    )
    assert all(last[key] > first[key] for key in first)
    for config in configs:
        if config.model._target_.endswith("Compressive"):
            instantiate(config.model).check_block_size(config.train.block_size)


def test_the_point_that_is_best_in_validation_is_chosen_and_run_with_the_table_s_seeds(tmp_path, make_run):
    row, runs = preset_row(LONG, "Expire-Span"), tmp_path / "runs"
    tried = points(row)
    nothing = choose(row, tried, "mini", runs)
    assert nothing.row.overrides == ()  # nothing to launch
    assert sweeps([nothing.row], "mini", runs, []) == []
    best = next(point for point in tried if point.preset.endswith("lr_0.002_alpha_0.0003"))
    for number, point in enumerate(tried[:-1]):
        make_run(point, 0, {"valid/accuracy": 0.9 if point is best else 0.5, "test/accuracy": 0.1 * number})
    unfinished = make_run(tried[-1], 0)
    (unfinished / "summary.json").unlink()
    make_run(row, 1)  # which was not tuned
    some = choose(row, tried, "mini", runs)
    assert some.row.overrides == ()  # with fewer points than the others it would not be a fair choice
    lines, _ = read_lines(tuned_table(table_of(row), {row.preset: some}), "mini", runs)
    assert lines[0].runs.empty
    assert f"| Expire-Span | {len(tried) - 1} of {len(tried)} " in describe([some])
    assert f"- Not finished: mini/{tried[-1].preset}/seed0: no summary.json" in describe([some])
    (unfinished / "run.log").write_text("[ERROR] train/loss is nan at update 2; try a lower optimizer.lr\n")
    choice = choose(row, tried, "mini", runs)  # a point that has diverged was tried, too
    assert (choice.finished, choice.points) == (len(tried) - 1, len(tried))
    assert (choice.metric, choice.value) == ("valid/accuracy", 0.9)
    assert choice.row.overrides == best.overrides
    assert choice.row.seeds == (1, 2, 3)
    assert choice.row.preset == f"tuned/{LONG}/lr_0.002_alpha_0.0003"
    assert choice.settings == {"optimizer.lr": "0.002", "memory.alpha": "0.0003"}


def test_a_lower_error_is_the_better_one(tmp_path, make_run):
    row = preset_row(LONG)
    tried = points(row)
    for number, point in enumerate(tried):
        make_run(point, 0, {"valid/error": 0.2 if number == 1 else 0.3}, metric="error")
    choice = choose(row, tried, "mini", tmp_path / "runs")
    assert choice.row.overrides == tried[1].overrides
    assert choice.settings["optimizer.lr"] == "0.0005 (lowest tried)"  # a still lower one may be better
