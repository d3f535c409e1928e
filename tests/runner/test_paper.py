"""The paper's tables by one command: what is missing is run, once; the paper's numbers stand beside ours."""

import json
import shutil

import pandas as pd
import pytest
from forked_command import forked_command
from hydra.utils import instantiate
from tiny_config import COPY, compose_config, tiny_config

from expire_span.paper_tables import Table, missing_seeds, paper_numbers, read_lines, read_table, table_names, write
from expire_span.runner.commands.paper import Progress, launch, sweeps
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.config_files import ConfigFiles, load_config
from expire_span.runner.train import train

SHORT, LONG = "table1_trans_xl_2k", "table1_expire_span_128k"
TABLE = Table("table1", "Accuracy on copy", ["test/accuracy"], {SHORT: "Transformer-XL", LONG: "Expire-Span"})


def make_run(runs, preset, seed, *overrides):
    folder = runs / "mini" / preset / f"seed{seed}"
    folder.mkdir(parents=True)
    config = tiny_config(f"experiment=mini/{preset}", f"seed={seed}", "train.updates=2", *overrides)
    train(config, folder, config_files=ConfigFiles(config, {}, []).texts())
    return folder


@pytest.mark.parametrize("preset", dict.fromkeys(preset for name in table_names() for preset in read_table(name).rows))
def test_a_row_is_the_same_task_and_model_at_each_size(preset):
    small, large = (validate(compose_config(f"experiment={name}")) for name in (f"mini/{preset}", preset))
    assert small.task._target_ == large.task._target_
    assert small.model._target_ == large.model._target_
    assert small.transformer.hidden_size < large.transformer.hidden_size
    if small.model._target_.endswith("Compressive"):
        instantiate(small.model).check_block_size(small.train.block_size)


@pytest.mark.parametrize("name", table_names())
def test_a_table_has_a_column_for_every_number_of_the_paper(name):
    table = read_table(name)
    numbers = [metric for preset in table.rows for metric in paper_numbers(preset)]
    costs = {"perf/peak_memory_gb", "perf/ms_per_batch"}  # of table 4, which a row of table 3 may have, too
    assert set(numbers) - costs <= set(table.metrics)
    assert name.startswith("figure") or all(paper_numbers(preset) for preset in table.rows)


def test_what_is_missing_is_run_once_and_then_nothing(tmp_path):
    runs, table = tmp_path / "runs", TABLE._replace(rows={LONG: "Expire-Span"})
    [command] = sweeps([table, table], "mini", [1], runs, [*COPY, "train.updates=2"])  # a row that two tables share
    assert launch(command) == 0
    folder = runs / "mini" / LONG / "seed1"
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert load_config(folder).wandb.group == f"mini/{LONG}"  # what W&B averages over
    assert sweeps([table], "mini", [1], runs, []) == []
    [command] = sweeps([table], "mini", [1, 2, 3], runs, [])
    assert f"experiment=mini/{LONG}" in command
    assert "seed=2,3" in command


def test_rows_that_lack_the_same_seeds_are_one_sweep(tmp_path):
    folder = make_run(tmp_path, LONG, 1)
    first, second = sweeps([TABLE], "mini", [1, 2], tmp_path, [])
    assert [f"experiment=mini/{SHORT}", "seed=1,2"] == first[1:3]
    assert [f"experiment=mini/{LONG}", "seed=2"] == second[1:3]
    (folder / "summary.json").write_text("{")  # a run that was cut short, or damaged
    [both] = sweeps([TABLE], "mini", [1, 2], tmp_path, [])
    assert [f"experiment=mini/{SHORT},mini/{LONG}", "seed=1,2"] == both[1:3]


def test_the_progress_counts_the_updates_of_runs_that_have_begun(tmp_path):
    make_run(tmp_path, LONG, 1)
    begun = make_run(tmp_path, LONG, 2)
    (begun / "summary.json").unlink()
    text = (begun / ".hydra/config.yaml").read_text()
    (begun / ".hydra/config.yaml").write_text(text.replace("\n  updates: 2\n", "\n  updates: 8\n"))
    progress = Progress([TABLE], "mini", [1, 2], tmp_path)
    assert str(progress) == "1 of 4 runs are done, 1 begun"
    progress.start -= 60
    make_run(tmp_path, SHORT, 1)
    assert str(progress) == "2 of 4 runs are done, 1 begun, about 2 min left"  # 1.75 more at one in a minute


def test_the_table_has_the_paper_s_number_beside_ours_and_says_what_is_missing(tmp_path):
    folders = [make_run(tmp_path / "runs", LONG, seed) for seed in (1, 2)]
    text, missing = write(TABLE, "mini", [1, 2, 3], tmp_path / "runs", tmp_path / "out")
    assert missing == 4
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:]]
        for row in text.splitlines()
        if row.startswith("| ")
    }
    assert rows["Transformer-XL"][:3] == ["26.7", "not run", "0 of 3"]
    ours = [json.loads((folder / "summary.json").read_text())["metrics"]["test/accuracy"] for folder in folders]
    assert rows["Expire-Span"][0] == "52.1"
    assert float(rows["Expire-Span"][1].split(" ±")[0]) == pytest.approx(50 * sum(ours))
    assert rows["Expire-Span"][2] == "2 of 3"
    assert "2 runs on cpu, float32, commit " in text
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["table1.csv", "table1.md", "table1.png", "table1.svg"]
    assert (tmp_path / "out/table1.md").read_text() == text
    csv = pd.read_csv(tmp_path / "out/table1.csv")
    assert csv["preset"].tolist() == [SHORT, LONG, LONG]  # a line for the row that was not run, and for each run
    assert csv["folder"].dropna().tolist() == [f"mini/{LONG}/seed{seed}" for seed in (1, 2)]
    assert csv["test/accuracy"].dropna().tolist() == pytest.approx(ours)


def test_runs_of_one_row_with_different_settings_are_shown_and_not_averaged(tmp_path):
    make_run(tmp_path, LONG, 1)
    make_run(tmp_path, LONG, 2, "memory.alpha=0.5")
    lines, _ = read_lines(TABLE, "mini", tmp_path)
    assert [(line.title, len(line.runs)) for line in lines] == [
        ("Transformer-XL", 0),
        ("Expire-Span", 1),
        ("Expire-Span", 1),
    ]


def test_an_unfinished_run_is_a_hole_with_its_reason_and_what_was_not_measured_is_not_told(tmp_path):
    folder = make_run(tmp_path / "runs", LONG, 1)
    shutil.copytree(folder, folder.with_name("seed2"))
    (folder.with_name("seed2") / "summary.json").unlink()
    assert missing_seeds(LONG, "mini", [1, 2], tmp_path / "runs") == (2,)
    table = TABLE._replace(metrics=["test/accuracy", "perf/peak_memory_gb"], rows={LONG: "Expire-Span"})
    text, missing = write(table, "mini", [1, 2], tmp_path / "runs", tmp_path / "out")
    assert missing == 1
    assert "seed2: no summary.json: stopped, failed or still running, last logged update 2" in text
    table = table._replace(rows={"table3_adaptive_span": "Adaptive-Span"})  # whose peak memory the paper tells
    shutil.copytree(folder, tmp_path / "runs/mini/table3_adaptive_span/seed1")
    text, _ = write(table, "mini", [1], tmp_path / "runs", tmp_path / "out")
    assert "| 17.2 " in text
    assert "not measured" in text  # there is no GPU here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "there is no tabel3; there are figure4, figure5,"),
        (["size=mini"], "name a table: figure4, figure5,"),
        (["table1", "size=tiny"], "size must be one of mini, paper, got tiny"),
        (["table1", "memory.alpha=1"], "memory.alpha belongs to the presets of the table"),
        (["table1", "--seeds=one"], "--seeds must be numbers with commas between them, as in 1,2,3, got one"),
        (["table1", "--no-launch"], "9 runs are missing; the same command goes on with them"),
    ],
)
def test_bad_input_and_holes_are_one_line_and_a_code(arguments, message, tmp_path):
    (tmp_path / "work").mkdir()
    ended = forked_command(["expire-span-paper", *arguments], tmp_path / "work")
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr
