import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from run_folders import run_folder

from expire_span.results import RUN_COLUMNS, load_metrics, load_runs, metric_columns, setting_columns
from expire_span.runner.commands.report import markdown_report
from expire_span.runner.run_folder.files import append_metrics, write_summary


def test_a_run_is_a_row_with_its_settings_and_metrics_as_columns(tmp_path):
    config = {"model.alpha": 1e-3, "train.betas": [0.9, 0.95]}
    run_folder(tmp_path / "run", seed=3, config=config, started="2026-01-02T03:04:05+00:00", data={"sha256": "ab"})
    runs = load_runs(tmp_path)
    assert list(runs.columns[: len(RUN_COLUMNS)]) == RUN_COLUMNS
    (run,) = runs.to_dict("records")
    assert (run["folder"], run["task"], run["model"]) == (str(tmp_path / "run"), "copy", "expire_span")
    assert (run["seed"], run["finished"], run["problem"], run["commit"], run["dirty"]) == (3, True, "", "c0ffee", False)
    assert run["started"] == pd.Timestamp("2026-01-02T03:04:05", tz="UTC")
    assert (run["model.alpha"], run["train.batch_size"], run["protocol.tokens"]) == (1e-3, 16, 1003)
    assert (run["train.betas"], run["data.sha256"]) == ("[0.9, 0.95]", "ab")
    assert (run["test/accuracy"], run["test/memory/size"]) == (0.9, 16.5)


def test_columns_have_the_types_of_what_they_hold(tmp_path):
    run_folder(tmp_path / "a", config={"model.alpha": 1e-3}, metrics={"test/accuracy": 1, "test/memory/bytes": 512})
    run_folder(tmp_path / "b", config={"train.cosine": True}, metrics={"test/accuracy": math.nan})
    (tmp_path / "killed/.hydra").mkdir(parents=True)
    types = {name: str(dtype) for name, dtype in load_runs(tmp_path).dtypes.items()}
    assert {types[name] for name in ("test/accuracy", "test/memory/bytes", "perf/ms_per_batch")} == {"float64"}
    assert {types[name] for name in ("seed", "train.batch_size", "protocol.updates")} == {"Int64"}
    assert {types[name] for name in ("finished", "dirty", "train.cosine")} == {"boolean"}
    assert types["model.alpha"] == "Float64"
    assert types["task"] == "string"
    assert types["started"].startswith("datetime64")


def test_a_column_is_a_setting_or_a_metric_or_of_the_run_or_of_the_paper(tmp_path):
    run_folder(tmp_path / "run", paper={"test/accuracy": 0.521}, data={"book/one.txt": 7})
    runs = load_runs(tmp_path)
    settings, metrics = setting_columns(runs), metric_columns(runs)
    assert {"train.batch_size", "protocol.max_span", "data.book:one.txt"} <= set(settings)
    assert metrics == ["test/accuracy", "test/memory/size", "test/memory/held", "perf/ms_per_batch"]
    assert set(runs) - set(settings) - set(metrics) == {*RUN_COLUMNS, "paper: test/accuracy"}
    assert runs["paper: test/accuracy"][0] == 0.521


def test_a_notebook_averages_over_seeds(tmp_path):
    for model, accuracies in (("expire_span", (0.9, 1.0)), ("trans_xl", (0.25, math.nan))):
        for seed, accuracy in enumerate(accuracies):
            run_folder(tmp_path / f"{model}{seed}", seed, model=model, metrics={"test/accuracy": accuracy})
    write_summary(run_folder(tmp_path / "cut"), {"model": "expire_span"})
    means = load_runs(tmp_path).groupby("model")["test/accuracy"].mean()
    assert means.to_dict() == {"expire_span": pytest.approx(0.95), "trans_xl": 0.25}


def test_a_run_with_a_problem_has_no_metrics_but_says_what_can_be_read(tmp_path):
    run_folder(tmp_path / "good")
    append_metrics(run_folder(tmp_path / "stopped", seed=4, finished=False) / "metrics.jsonl", {"update": 40})
    runs = load_runs(tmp_path).set_index("folder")
    stopped = runs.loc[str(tmp_path / "stopped")]
    assert stopped["problem"] == "unfinished, last logged update 40"
    assert (stopped["task"], stopped["seed"], stopped["finished"]) == ("copy", 4, False)
    assert math.isnan(stopped["test/accuracy"])
    assert runs.loc[str(tmp_path / "good"), "problem"] == ""


@pytest.mark.parametrize(
    "nonsense",
    [
        {"task": ["copy"]},
        {"seed": {}, "protocol": {"seed": [1], "updates": {"deep": 1}}},
        {"started": 20260101},
        {"started": "yesterday", "commit": {"a": 1}, "dirty": "perhaps"},
        {"simplifications": 7},
        {"far_behind": 7},
        {"config": {"train": 3, "seed": "one"}},
        {"metrics": {"test/accuracy": [0.9]}},
        {"metrics": None},
        {"protocol": None},
        {"paper": {"test/accuracy": "high"}},
        {"data": ["a", "b"]},
        {"format": 3},
    ],
    ids=str,
)
def test_nonsense_in_one_summary_leaves_the_other_runs_as_they_are(tmp_path, nonsense):
    from expire_span.runner.commands.report import markdown_report

    run_folder(tmp_path / "good")
    folder = run_folder(tmp_path / "odd", seed=2)
    summary = json.loads((folder / "summary.json").read_text())
    write_summary(folder, summary | nonsense)
    runs = load_runs(tmp_path)
    assert list(runs.loc[runs["folder"] == str(tmp_path / "good"), "test/accuracy"]) == [0.9]
    assert "copy" in markdown_report(runs, ["test/accuracy>=0.5"])


def test_a_later_format_is_named(tmp_path):
    run_folder(tmp_path / "run", format=3)
    assert load_runs(tmp_path)["problem"][0] == "summary.json has format 3; this version reads format 2"


def test_without_a_config_in_the_summary_that_of_hydra_is_used(tmp_path):
    for batch in (8, 16):
        folder = run_folder(tmp_path / f"{batch}")
        (folder / ".hydra").mkdir()
        sections = "wandb: {name: '${hydra:job.name}'}\npaper: {test/bpb: 1.0}\n"
        config = f"seed: 1\nsize: {batch}\ntrain: {{batch_size: '${{size}}'}}\n{sections}"
        (folder / ".hydra/config.yaml").write_text(config)
        summary = json.loads((folder / "summary.json").read_text())
        del summary["config"]
        write_summary(folder, summary)
    runs = load_runs(tmp_path)
    assert sorted(runs["train.batch_size"]) == [8, 16]
    assert not [name for name in runs if name.startswith(("wandb", "paper"))]


def test_a_folder_given_twice_counts_once_and_one_without_runs_is_refused(tmp_path):
    run_folder(tmp_path / "runs/a")
    (tmp_path / "empty").mkdir()
    assert len(load_runs(tmp_path, tmp_path / "runs", str(tmp_path / "runs/a"))) == 1
    with pytest.raises(ValueError, match="empty holds no run"):
        load_runs(tmp_path / "empty")
    with pytest.raises(ValueError, match="missing is not a folder"):
        load_runs(tmp_path / "missing")


def test_metrics_are_a_table_by_update_and_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"update": 20, "train/loss": 1.5})
    append_metrics(path, {"update": 20, "valid/bpb": math.nan})
    append_metrics(path, {"update": 40, "train/loss": 1.25})
    with open(path, "a") as file:
        file.write('{"update": 60, "tra')
    metrics = load_metrics(tmp_path)
    assert metrics.index.name == "update"
    assert metrics["train/loss"].dropna().to_dict() == {20: 1.5, 40: 1.25}
    assert metrics["valid/bpb"].isna().all()


def test_an_empty_metrics_file_is_an_empty_table(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert load_metrics(tmp_path).empty
    assert load_metrics(tmp_path).index.name == "update"


def test_the_package_and_the_files_of_a_run_do_without_pandas():
    code = "import sys, expire_span, expire_span.runner.run_folder.files; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "hostile",
    [
        {"protocol": {"seed": [1]}},
        {"protocol": {"seed": 10**30}},
        {"protocol": []},
        {"commit": {"a": 1}},
        {"simplifications": 7},
        {"far_behind": [{}]},
        {"metrics": {"test/accuracy": 10**400}},
        {"metrics": {"test/accuracy": [1]}},
        {"metrics": "none"},
        {"config": {"memory": {"alpha": 10**30}}},
        {"task": {"name": ["copy"]}, "config": 5},
    ],
    ids=str,
)
def test_a_summary_with_values_of_wrong_types_is_one_line_and_the_others_are_shown(hostile, tmp_path):
    run_folder(tmp_path / "good")
    path = run_folder(tmp_path / "bad") / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | hostile))
    runs = load_runs(tmp_path)
    assert dict(zip(runs["folder"].map(lambda folder: Path(folder).name), runs["problem"] == "", strict=True)) == {
        "good": True,
        "bad": False,
    }
    table = markdown_report(runs)
    assert "| 0.9 " in table
    assert len([line for line in table.splitlines() if "bad" in line]) == 1


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "[]", "7", "{", "\x00"])
def test_a_summary_that_is_no_summary_is_one_line_and_the_others_are_shown(content, tmp_path):
    run_folder(tmp_path / "good")
    (run_folder(tmp_path / "bad") / "summary.json").write_text(content)
    table = markdown_report(load_runs(tmp_path))
    assert "| 0.9 " in table
    assert len([line for line in table.splitlines() if "bad" in line]) == 1


def test_a_folder_with_nothing_but_an_empty_log_is_no_run(tmp_path):
    run_folder(tmp_path / "good")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "run.log").touch()
    assert len(load_runs(tmp_path)) == 1
