import csv
import json
import math
import subprocess
import sys

import pandas as pd
import pytest
from run_folders import run_folder

from expire_span.results import load_runs
from expire_span.runner.commands.report import main, markdown_report
from expire_span.runner.run_folder.files import append_metrics, write_summary


def rows(text):
    """Cells of the first table in a text, by header."""
    lines = [line.strip("| ").split("|") for line in text.partition("\n\n")[0].splitlines()]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, cells, strict=True)) for cells in body]


def report(folder, *thresholds, **options):
    return markdown_report(load_runs(folder), thresholds, **options)


def test_runs_that_differ_only_in_the_seed_share_a_row_with_mean_and_sample_deviation(tmp_path):
    for seed, accuracy in enumerate((0.9, 0.95, 1.0)):
        run_folder(tmp_path / f"{seed}", seed, metrics={"test/accuracy": accuracy})
    (row,) = rows(report(tmp_path))
    assert row["seeds"] == "3"
    assert row["test/accuracy"] == "0.95 ± 0.05"
    assert (row["memory/size"], row["memory/held"]) == ("16.5 ± 0", "20 ± 0")
    assert row["perf/ms_per_batch"] == "20"
    assert row["updates"] == "400"


def test_runs_on_other_data_do_not_share_a_row(tmp_path):
    for seed, text in ((1, "aa"), (2, "bb")):
        run_folder(tmp_path / f"{seed}", seed, data={"sha256": text})
    assert [row["seeds"] for row in rows(report(tmp_path))] == ["1", "1"]


def test_evaluations_of_several_seeds_share_a_row_but_not_those_of_runs_trained_otherwise(tmp_path):
    for name, seed, dropout in (("a", 1, 0.1), ("b", 2, 0.1), ("c", 3, 0.3)):
        folder = run_folder(tmp_path / name, seed, trained={"transformer.dropout": dropout})
        summary = json.loads((folder / "summary.json").read_text())
        summary["config"]["evaluate"] = f"runs/{name}"
        write_summary(folder, summary)
    assert sorted(row["seeds"] for row in rows(report(tmp_path))) == ["1", "2"]


def test_one_run_has_no_spread(tmp_path):
    run_folder(tmp_path / "run")
    assert rows(report(tmp_path))[0]["test/accuracy"] == "0.9"


@pytest.mark.parametrize(
    "difference",
    [
        {"config": {"task.episode_length": 256}},
        {"config": {"train.batch_size": 8}},
        {"config": {"model.max_span": 512}},
        {"protocol": {"splits": ["valid"]}},
        {"protocol": {"device": "NVIDIA H100"}},
    ],
    ids=str,
)
def test_runs_of_another_setting_or_protocol_are_never_averaged_and_the_table_shows_which(tmp_path, difference):
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", seed=2, **difference)
    ((key, value),) = next(iter(difference.values())).items()
    shown = [row.get(key, row.get(f"protocol.{key}")) for row in rows(report(tmp_path))]
    assert len(shown) == 2
    assert (json.dumps(value) if isinstance(value, list) else str(value)) in shown


def test_runs_that_log_to_different_places_share_a_row(tmp_path):
    run_folder(tmp_path / "a", seed=1)
    folder = run_folder(tmp_path / "b", seed=2)
    summary = json.loads((folder / "summary.json").read_text())
    summary["config"]["wandb"] = {"mode": "offline"}
    write_summary(folder, summary)
    assert len(rows(report(tmp_path))) == 1


def test_a_setting_that_the_model_explains_has_no_column(tmp_path):
    run_folder(tmp_path / "a", model="expire_span")
    run_folder(tmp_path / "b", model="trans_xl")
    assert not {key for row in rows(report(tmp_path)) for key in row if "max_span" in key or "target" in key}


def test_a_setting_other_than_the_models_own_that_differs_between_models_has_a_column(tmp_path):
    run_folder(tmp_path / "a", model="expire_span")
    run_folder(tmp_path / "b", model="trans_xl", config={"train.batch_size": 8})
    assert [row["train.batch_size"] for row in rows(report(tmp_path))] == ["16", "8"]


def test_a_setting_that_stands_in_several_places_has_one_column(tmp_path):
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", config={"model.max_span": 1024, "train.updates": 800})
    header = rows(report(tmp_path))[0].keys()
    assert [key for key in header if "span" in key or "updates" in key] == ["model.max_span", "updates"]


def test_rows_are_sorted_by_number_not_by_letter(tmp_path):
    for span in (1024, 64, 256):
        run_folder(tmp_path / f"{span}", config={"model.max_span": span})
    assert [row["model.max_span"] for row in rows(report(tmp_path))] == ["64", "256", "1024"]


def test_of_equal_runs_of_one_seed_the_latest_counts_and_the_other_is_named(tmp_path):
    run_folder(tmp_path / "new", metrics={"test/accuracy": 0.5}, started="2026-02-01T00:00:00+00:00")
    run_folder(tmp_path / "old", started="2026-01-01T00:00:00+00:00")
    text = report(tmp_path)
    assert [(row["seeds"], row["test/accuracy"]) for row in rows(text)] == [("1", "0.5")]
    assert f"- {tmp_path / 'old'}: the same settings and seed as {tmp_path / 'new'}" in text


def test_a_threshold_counts_the_seeds_that_meet_it(tmp_path):
    for seed, accuracy in enumerate((0.94, 0.95, math.nan)):
        run_folder(tmp_path / f"{seed}", seed, metrics={"test/accuracy": accuracy})
    (row,) = rows(report(tmp_path, "test/accuracy>=0.95", "test/accuracy < 0.95", "test/memory/size>20"))
    assert row["test/accuracy>=0.95"] == "1 of 3"
    assert row["test/accuracy < 0.95"] == "1 of 3"
    assert row["test/memory/size>20"] == "0 of 3"
    assert row["test/accuracy"] == "0.945 ± 0.0071 (2 of 3)"


def test_each_task_is_shown_by_its_own_metric(tmp_path):
    run_folder(tmp_path / "a", metrics={"train/accuracy": 1.0})
    run_folder(tmp_path / "b", task="enwik8", metric="bpb", metrics={"test/bpb": 1.0059, "test/accuracy": None})
    copy, enwik8 = rows(report(tmp_path, "test/bpb<=2"))
    assert (copy["test/accuracy"], copy["test/bpb"], copy["test/bpb<=2"]) == ("0.9", "", "")
    assert (enwik8["test/accuracy"], enwik8["test/bpb"], enwik8["test/bpb<=2"]) == ("", "1.006", "1 of 1")
    assert "train/accuracy" not in copy


def test_memory_of_a_gpu_and_of_a_process_have_separate_columns(tmp_path):
    run_folder(tmp_path / "a", metrics={"perf/peak_memory_gb": 8.4}, protocol={"device": "cuda"})
    run_folder(tmp_path / "b", metrics={"perf/peak_resident_gb": 0.6}, protocol={"device": "cpu"})
    cells = [(row["perf/peak_memory_gb"], row["perf/peak_resident_gb"]) for row in rows(report(tmp_path))]
    assert sorted(cells) == [("", "0.6"), ("8.4", "")]


def test_a_task_in_which_the_model_acts_is_shown_by_its_metric_in_the_episodes_of_the_test(tmp_path):
    metrics = {"test/rl/success": 0.75, "test/rl/episode_length": 20.0, "test/accuracy": None, "rl/success": 0.5}
    run_folder(tmp_path / "run", task="corridor", metric="success", metrics=metrics)
    (row,) = rows(report(tmp_path))
    assert (row["test/rl/success"], row["rl/success"]) == ("0.75", "0.5")
    assert "test/rl/episode_length" not in row


def test_the_papers_figure_stands_beside_the_result(tmp_path):
    run_folder(tmp_path / "preset", task="enwik8", metric="bpb", metrics={"test/bpb": 1.1}, paper={"test/bpb": 0.994})
    run_folder(tmp_path / "own", task="enwik8", metric="bpb", metrics={"test/bpb": 1.2}, config={"train.updates": 9})
    table = rows(report(tmp_path))
    assert [key for key in table[0] if "bpb" in key] == ["test/bpb", "paper: test/bpb"]
    assert [(row["test/bpb"], row["paper: test/bpb"]) for row in table] == [("1.2", ""), ("1.1", "0.994")]


def test_a_seed_without_the_paper_figure_shares_the_row_of_those_that_have_it(tmp_path):
    run_folder(tmp_path / "a", seed=1, paper={"test/accuracy": 0.521})
    run_folder(tmp_path / "b", seed=2)
    (row,) = rows(report(tmp_path))
    assert (row["seeds"], row["paper: test/accuracy"]) == ("2", "0.521")


def test_a_cost_that_not_every_seed_has_says_of_how_many_it_is(tmp_path):
    run_folder(tmp_path / "a", seed=1)
    run_folder(tmp_path / "b", seed=2, metrics={"perf/ms_per_batch": None, "test/memory/size": None})
    (row,) = rows(report(tmp_path))
    assert (row["perf/ms_per_batch"], row["memory/size"]) == ("20 (1 of 2)", "16.5 (1 of 2)")


def test_memory_of_the_test_goes_before_that_of_training(tmp_path):
    run_folder(tmp_path / "a", metrics={"memory/size": 3.0, "valid/memory/size": 4.0})
    assert rows(report(tmp_path))[0]["memory/size"] == "16.5"


def test_a_batch_size_of_evaluation_that_follows_that_of_training_has_no_column_of_its_own(tmp_path):
    for size in (8, 16):
        run_folder(tmp_path / f"{size}", config={"train.batch_size": size}, protocol={"eval_batch_size": size})
    assert [key for key in rows(report(tmp_path))[0] if "batch_size" in key] == ["train.batch_size"]


def test_a_setting_with_a_pipe_keeps_the_table_whole(tmp_path):
    run_folder(tmp_path / "a", config={"task.path": "a|b\nc"})
    run_folder(tmp_path / "b", config={"task.path": "d"})
    text = report(tmp_path)
    assert "a\\|b c" in text
    assert len(text.splitlines()) == 4


def test_a_setting_with_values_of_several_types_gets_a_column(tmp_path):
    for name, value in (("a", 8), ("b", "all"), ("c", None)):
        run_folder(tmp_path / name, config={"task.limit": value})
    assert [row["task.limit"] for row in rows(report(tmp_path))] == ["8", "all", ""]


def test_simplifications_and_mixed_commits_are_footnotes(tmp_path):
    run_folder(tmp_path / "a", seed=1, simplifications=["one layer", "4 x 4 cells"])
    run_folder(tmp_path / "b", seed=2, simplifications=["one layer", "4 x 4 cells"], commit="decaf")
    text = report(tmp_path)
    assert rows(text)[0]["model"] == "expire_span [1] [2]"
    assert "1. simplified: one layer; 4 x 4 cells\n2. seeds of different commits: c0ffee, decaf" in text


def test_a_run_that_was_far_behind_its_recipe_is_named_in_a_footnote_and_in_the_csv(tmp_path):
    behind = [
        "train/accuracy is 0.2 at update 56, where this recipe had 0.8",
        "train/accuracy is 0.3 at update 560 ...",
    ]
    run_folder(tmp_path / "a", seed=1, far_behind=[])
    run_folder(tmp_path / "b", seed=2, far_behind=behind)
    text = report(tmp_path)
    assert rows(text)[0]["model"] == "expire_span [1]"
    assert f"1. {tmp_path}/b was far behind its recipe: {behind[0]}; {behind[1]}\n" in text
    main([str(tmp_path), "--csv", str(tmp_path / "runs.csv")])
    assert pd.read_csv(tmp_path / "runs.csv")["far_behind"].fillna("").tolist() == ["", "; ".join(behind)]


def test_accuracy_by_distance_has_its_bins_in_order(tmp_path):
    bins = {f"test/accuracy_distance_{low}_{high}": low / 1000 for low, high in ((128, 512), (0, 16), (16, 128))}
    run_folder(tmp_path / "run", metrics=bins)
    text = report(tmp_path, distance=True).partition("test/accuracy by distance (timesteps)\n\n")[2]
    (row,) = rows(text)
    assert list(row.items())[-3:] == [("0 to 16", "0"), ("16 to 128", "0.016"), ("128 to 512", "0.128")]


def test_unfinished_and_broken_runs_are_listed_with_the_reason(tmp_path):
    run_folder(tmp_path / "good")
    append_metrics(run_folder(tmp_path / "stopped", finished=False) / "metrics.jsonl", {"update": 40})
    (tmp_path / "killed/.hydra").mkdir(parents=True)
    (run_folder(tmp_path / "cut") / "summary.json").write_text('{"task": "co')
    write_summary(run_folder(tmp_path / "old"), {"task": "copy", "finished": True})
    write_summary(run_folder(tmp_path / "odd"), ["not", "a", "summary"])
    run_folder(tmp_path / "text", metrics={"test/accuracy": "high"})
    write_summary(run_folder(tmp_path / "former"), {"task": "copy", "measure": "accuracy", "figures": {}})
    text = report(tmp_path)
    assert len(rows(text)) == 1
    listed = dict(line.removeprefix(f"- {tmp_path}/").split(": ", 1) for line in text.splitlines() if line[:2] == "- ")
    assert listed.keys() == {"stopped", "killed", "cut", "old", "odd", "text", "former"}
    assert listed["stopped"] == "unfinished, last logged update 40"
    assert listed["killed"] == "no summary.json: stopped, failed or still running, nothing logged"
    assert listed["old"] == "summary.json lacks format, metric, metrics, model, protocol"
    assert listed["cut"].endswith("summary.json is damaged: it is not JSON")
    assert listed["former"] == "written by expire-span 0.1, whose names have changed: read it with that version"


def test_without_a_finished_run_the_problems_are_listed(tmp_path):
    (tmp_path / "killed/.hydra").mkdir(parents=True)
    text = report(tmp_path, "test/accuracy>=0.5", distance=True)
    assert text.startswith("No finished run.\n")
    assert "killed: no summary.json" in text


def test_csv_keeps_every_digit_of_every_run(tmp_path):
    accuracies = {1: 1 / 3, 2: 0.1 + 0.2}
    for seed, accuracy in accuracies.items():
        run_folder(tmp_path / f"{seed}", seed, metrics={"test/accuracy": accuracy, "test/memory/bytes": 2**53})
    main([str(tmp_path), "--csv", str(tmp_path / "runs.csv")])
    with open(tmp_path / "runs.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert {int(row["seed"]): float(row["test/accuracy"]) for row in written} == accuracies
    assert {row["train.batch_size"] for row in written} == {"16"}
    assert {int(float(row["test/memory/bytes"])) for row in written} == {2**53}


def test_the_command_prints_the_table_and_writes_the_same_to_a_file(tmp_path):
    run_folder(tmp_path / "runs/a")
    command = [
        sys.executable,
        "-m",
        "expire_span.runner.commands.report",
        "runs",
        "--threshold",
        "test/accuracy>=0.5",
        "--markdown",
        "table.md",
        "--csv",
        "runs.csv",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "table.md").read_text()
    assert "| 1 of 1 " in done.stdout
    assert (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize("option", ["--markdown", "--csv", "--html"])
def test_the_folder_of_a_file_that_is_written_is_made(tmp_path, monkeypatch, option):
    run_folder(tmp_path / "runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    main([str(tmp_path / "runs"), f"{option}=~/new folder/of this/file"])
    assert "expire_span" in (tmp_path / "new folder/of this/file").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is not a folder"),
        (["runs", "--threshold", "accuracy"], "threshold 'accuracy' must look like 'test/accuracy>=0.95'"),
        (
            ["runs", "--threshold", "test/acuracy>=0.9"],
            "no run has a metric 'test/acuracy', but for example test/accuracy",
        ),
        (["runs", "--bar", "test/accuracy>=0.9"], "--bar is now called --threshold: --threshold 'test/accuracy>=0.9'"),
        (["runs", "--csv", "/dev/null/runs.csv"], "error: /dev/null: File exists"),
        (["runs", "--markdown", "runs"], "error: runs: Is a directory"),
    ],
    ids=["path", "threshold", "metric", "former name", "no folder", "no file"],
)
def test_a_wrong_argument_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    run_folder(tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    captured = capsys.readouterr()
    [line] = (captured.err.splitlines() or [refused.value.code])[-1:]  # a wrong flag has its usage above
    assert message in line
    assert "usage" not in str(refused.value.code)
    assert captured.out == ""
