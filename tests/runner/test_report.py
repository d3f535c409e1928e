import csv
import json
import math
import subprocess
import sys

import pytest

from expire_span.runner.record import append_metrics, write_summary
from expire_span.runner.report import load_runs, main, table, write_csv


def run_folder(folder, seed=1, task="copy", model="expire_span", figures=(), config=(), protocol=(), **summary):
    """A finished run as the runner leaves it; `config` and `protocol` take dotted and plain keys."""
    settings = {
        "task": {"_target_": f"expire_span.tasks.{task}.Task", "distance": 128, "seed": seed},
        "model": {"_target_": f"expire_span.{model}", "max_span": 256 if model == "expire_span" else 128},
        "train": {"updates": 400, "batch": 16},
        "seed": seed,
    }
    for key, value in dict(config).items():
        group, _, name = key.partition(".")
        settings[group][name] = value
    folder.mkdir(parents=True)
    write_summary(folder, {
        "task": task, "model": model, "measure": "accuracy", "finished": True, "commit": "c0ffee", "dirty": False,
        "figures": {"test/accuracy": 0.9, "test/memory/size": 16.5, "perf/ms_per_batch": 20.0, **dict(figures)},
        "protocol": {"split": "test", "updates": settings["train"]["updates"], "tokens": 1000 + seed,
                     "batch": settings["train"]["batch"], "max_span": settings["model"]["max_span"],
                     "seed": seed, **dict(protocol)},
        "config": settings, **summary,
    })
    return folder


def rows(text):
    """Cells of the first table in a text, by header."""
    lines = [line.strip("| ").split("|") for line in text.partition("\n\n")[0].splitlines()]
    header, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, cells, strict=True)) for cells in body]


def report(folder, *bars, **options):
    return table(load_runs([folder]), bars, **options)


def test_runs_that_differ_only_in_the_seed_share_a_row_with_mean_and_sample_deviation(tmp_path):
    for seed, accuracy in enumerate((0.9, 0.95, 1.0)):
        run_folder(tmp_path / f"{seed}", seed, figures={"test/accuracy": accuracy})
    (row,) = rows(report(tmp_path))
    assert row["seeds"] == "3"
    assert row["test/accuracy"] == "0.95 ± 0.05"
    assert row["memory/size"] == "16.5 ± 0"
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


@pytest.mark.parametrize("difference", [
    {"config": {"task.distance": 256}}, {"config": {"train.batch": 8}}, {"config": {"model.max_span": 512}},
    {"protocol": {"split": "valid"}}, {"protocol": {"device": "NVIDIA H100"}},
], ids=str)
def test_runs_of_another_setting_or_protocol_are_never_averaged_and_the_table_shows_which(tmp_path, difference):
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", seed=2, **difference)
    ((key, value),) = next(iter(difference.values())).items()
    shown = [row.get(key, row.get(f"protocol.{key}")) for row in rows(report(tmp_path))]
    assert len(shown) == 2
    assert str(value) in shown


def test_where_logs_go_does_not_part_runs(tmp_path):
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


def test_a_setting_in_which_models_of_one_task_differ_unfairly_has_a_column(tmp_path):
    run_folder(tmp_path / "a", model="expire_span")
    run_folder(tmp_path / "b", model="trans_xl", config={"train.batch": 8})
    assert [row["train.batch"] for row in rows(report(tmp_path))] == ["16", "8"]


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
    run_folder(tmp_path / "new", figures={"test/accuracy": 0.5}, started="2026-02-01T00:00:00+00:00")
    run_folder(tmp_path / "old", started="2026-01-01T00:00:00+00:00")
    text = report(tmp_path)
    assert [(row["seeds"], row["test/accuracy"]) for row in rows(text)] == [("1", "0.5")]
    assert f"- {tmp_path / 'old'}: the same settings and seed as {tmp_path / 'new'}" in text


def test_a_bar_counts_the_seeds_that_reached_it(tmp_path):
    for seed, accuracy in enumerate((0.94, 0.95, math.nan)):
        run_folder(tmp_path / f"{seed}", seed, figures={"test/accuracy": accuracy})
    (row,) = rows(report(tmp_path, "test/accuracy>=0.95", "test/accuracy < 0.95", "test/memory/size>20"))
    assert row["test/accuracy>=0.95"] == "1 of 3"
    assert row["test/accuracy < 0.95"] == "1 of 3"
    assert row["test/memory/size>20"] == "0 of 3"
    assert row["test/accuracy"] == "0.945 ± 0.0071 (2 of 3)"


def test_each_task_is_shown_by_its_own_measure(tmp_path):
    run_folder(tmp_path / "a", figures={"train/accuracy": 1.0})
    run_folder(tmp_path / "b", task="enwik8", measure="bpb", figures={"test/bpb": 1.0059, "test/accuracy": None})
    copy, enwik8 = rows(report(tmp_path, "test/bpb<=2"))
    assert (copy["test/accuracy"], copy["test/bpb"], copy["test/bpb<=2"]) == ("0.9", "", "")
    assert (enwik8["test/accuracy"], enwik8["test/bpb"], enwik8["test/bpb<=2"]) == ("", "1.006", "1 of 1")
    assert "train/accuracy" not in copy


def test_memory_of_a_card_and_of_a_process_are_not_one_column(tmp_path):
    run_folder(tmp_path / "a", figures={"perf/peak_memory_gb": 8.4}, protocol={"device": "cuda"})
    run_folder(tmp_path / "b", figures={"perf/peak_resident_gb": 0.6}, protocol={"device": "cpu"})
    cells = [(row["perf/peak_memory_gb"], row["perf/peak_resident_gb"]) for row in rows(report(tmp_path))]
    assert sorted(cells) == [("", "0.6"), ("8.4", "")]


def test_simplifications_and_mixed_commits_are_footnotes(tmp_path):
    run_folder(tmp_path / "a", seed=1, simplifications=["one layer"])
    run_folder(tmp_path / "b", seed=2, simplifications=["one layer"], commit="decaf")
    text = report(tmp_path)
    assert rows(text)[0]["model"] == "expire_span [1] [2]"
    assert "1. one layer\n2. seeds of different commits: c0ffee, decaf" in text


def test_accuracy_by_distance_has_its_bins_in_order(tmp_path):
    bins = {f"test/accuracy_distance_{low}_{high}": low / 1000 for low, high in ((128, 512), (0, 16), (16, 128))}
    run_folder(tmp_path / "run", figures=bins)
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
    run_folder(tmp_path / "text", figures={"test/accuracy": "high"})
    text = report(tmp_path)
    assert len(rows(text)) == 1
    listed = dict(line.removeprefix(f"- {tmp_path}/").split(": ", 1) for line in text.splitlines() if line[:2] == "- ")
    assert listed.keys() == {"stopped", "killed", "cut", "old", "odd", "text"}
    assert listed["stopped"] == "unfinished, last logged update 40"
    assert listed["killed"] == "no summary.json: stopped, failed or still running, nothing logged"
    assert listed["old"] == "summary.json lacks figures, model, protocol"
    assert "JSONDecodeError" in listed["cut"]


def test_without_a_config_in_the_summary_that_of_hydra_is_used(tmp_path):
    for batch in (8, 16):
        folder = run_folder(tmp_path / f"{batch}", config={"train.batch": 0})
        (folder / ".hydra").mkdir()
        (folder / ".hydra/config.yaml").write_text(
            f"seed: 1\nblock: {batch}\ntrain: {{batch: '${{block}}'}}\nwandb: {{name: '${{hydra:job.name}}'}}\n"
        )
        summary = json.loads((folder / "summary.json").read_text())
        del summary["config"]
        write_summary(folder, summary)
    assert [row["train.batch"] for row in rows(report(tmp_path))] == ["8", "16"]


def test_a_folder_given_twice_counts_once_and_none_is_refused(tmp_path):
    run_folder(tmp_path / "runs/a")
    (tmp_path / "empty").mkdir()
    assert len(load_runs([tmp_path, tmp_path / "runs", tmp_path / "runs/a"])) == 1
    with pytest.raises(ValueError, match="empty holds no run"):
        load_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match="missing is not a folder"):
        load_runs([tmp_path / "missing"])


def test_csv_gives_back_every_number_of_every_run(tmp_path):
    accuracies = {1: 1 / 3, 2: 0.1 + 0.2}
    for seed, accuracy in accuracies.items():
        run_folder(tmp_path / f"{seed}", seed, figures={"test/accuracy": accuracy, "test/memory/bytes": 2**53})
    write_csv(tmp_path / "runs.csv", load_runs([tmp_path]))
    with open(tmp_path / "runs.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert {int(row["seed"]): float(row["test/accuracy"]) for row in written} == accuracies
    assert {row["train.batch"] for row in written} == {"16"}
    assert {row["test/memory/bytes"] for row in written} == {str(2**53)}


def test_the_command_prints_the_table_and_writes_the_same_to_a_file(tmp_path):
    run_folder(tmp_path / "runs/a")
    command = [sys.executable, "-m", "expire_span.runner.report", "runs", "--bar", "test/accuracy>=0.5",
               "--markdown", "table.md", "--csv", "runs.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "table.md").read_text()
    assert "| 1 of 1 " in done.stdout
    assert (tmp_path / "runs.csv").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["missing"], "missing is not a folder"),
    (["runs", "--bar", "accuracy"], "bar 'accuracy' must look like 'test/accuracy>=0.95'"),
    (["runs", "--bar", "test/acuracy>=0.9"], "no run has a figure 'test/acuracy'; there are perf/ms_per_batch"),
    (["runs", "--csv", "nowhere/runs.csv"], "nowhere/runs.csv"),
], ids=["path", "bar", "figure", "output"])
def test_a_wrong_argument_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    run_folder(tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
