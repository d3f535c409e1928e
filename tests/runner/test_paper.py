"""The paper's tables by one command: what is missing is run, once; the paper's numbers stand beside ours."""

import json
import re
import shutil
from importlib.resources import files

import pandas as pd
import pytest
import yaml
from forked_command import forked_command
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny_config import COPY, compose_config, config_options, tiny_config

from expire_span.paper_tables import (
    SIZES,
    Row,
    Table,
    missing_seeds,
    paper_numbers,
    preset_content,
    read_lines,
    read_table,
    table_names,
)
from expire_span.paper_tuning import choose, describe, factors, model_option, points
from expire_span.runner.commands.paper import Progress, launch, select_tables, sweeps, write_presets, write_table
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.config_files import ConfigFiles, load_config
from expire_span.runner.train import train

SHORT, LONG = "table1_trans_xl_2k", "table1_expire_span_128k"


def preset_row(preset, title="", seeds=(1, 2, 3)):
    return Row(preset, title, (f"experiment=mini/{preset}",), paper_numbers(preset), tuple(seeds))


def table_of(*rows, metrics=("test/accuracy",)):
    return Table("table1", "Accuracy on copy", list(metrics), list(rows))


def two_rows(*seeds):
    return table_of(preset_row(SHORT, "Transformer-XL", seeds), preset_row(LONG, "Expire-Span", seeds))


def make_run(runs, preset, seed, *overrides, experiment=None):
    folder = runs / "mini" / preset / f"seed{seed}"
    folder.mkdir(parents=True)
    name = experiment or f"experiment=mini/{preset}"
    config = tiny_config(name, f"seed={seed}", "train.updates=2", *overrides)
    train(config, folder, config_files=ConfigFiles(config, {}, []).texts())
    return folder


# A row of the user's own data needs a path, of a file that need not exist to compose its config.
ROWS = {
    (size, row.preset): row._replace(overrides=(*row.overrides, *(f"{key}=text.txt" for key in table.given)))
    for size in SIZES
    for table in (read_table(name, size) for name in table_names())
    for row in table.rows
}
PRESETS = dict.fromkeys(row.preset for row in ROWS.values() if row.overrides == (f"experiment={row.preset}",))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_is_the_same_task_and_model_at_each_size(preset):
    small, large = (validate(compose_config(f"experiment={name}")) for name in (f"mini/{preset}", preset))
    assert small.task._target_ == large.task._target_
    assert small.model._target_ == large.model._target_
    assert small.transformer.hidden_size < large.transformer.hidden_size
    if small.model._target_.endswith("Compressive"):
        instantiate(small.model).check_block_size(small.train.block_size)


@pytest.mark.parametrize("name", table_names())
def test_a_table_has_a_column_for_every_number_of_the_paper(name):
    table = next(table for size in SIZES if (table := read_table(name, size)).rows)
    numbers = [metric for row in table.rows for metric in row.paper]
    costs = {"perf/peak_memory_gb", "perf/ms_per_batch"}  # of table 4, which a row of table 3 may have, too
    assert set(numbers) - costs <= set(table.metrics)
    assert not name.startswith("table") or all(row.paper for row in table.rows)


def test_what_is_missing_is_run_once_and_then_nothing(tmp_path):
    runs, row = tmp_path / "runs", preset_row(LONG, seeds=[1])
    [command] = sweeps([row, row], "mini", runs, [*COPY, "train.updates=2"])  # a row that two tables share
    assert launch(command) == 0
    folder = runs / "mini" / LONG / "seed1"
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert load_config(folder).wandb.group == f"mini/{LONG}"  # what W&B averages over
    assert sweeps([row], "mini", runs, []) == []
    [command] = sweeps([preset_row(LONG)], "mini", runs, [])
    assert f"experiment=mini/{LONG}" in command
    assert "seed=2,3" in command


def test_rows_that_lack_the_same_seeds_are_one_sweep(tmp_path):
    folder = make_run(tmp_path, LONG, 1)
    first, second = sweeps(two_rows(1, 2).rows, "mini", tmp_path, [])
    assert [f"experiment=mini/{SHORT}", "seed=1,2"] == first[1:3]
    assert [f"experiment=mini/{LONG}", "seed=2"] == second[1:3]
    (folder / "summary.json").write_text("{")  # a run that was cut short, or damaged
    [both] = sweeps(two_rows(1, 2).rows, "mini", tmp_path, [])
    assert [f"experiment=mini/{SHORT},mini/{LONG}", "seed=1,2"] == both[1:3]


def test_the_progress_counts_the_updates_of_runs_that_have_begun(tmp_path):
    make_run(tmp_path, LONG, 1)
    begun = make_run(tmp_path, LONG, 2)
    (begun / "summary.json").unlink()
    text = (begun / ".hydra/config.yaml").read_text()
    (begun / ".hydra/config.yaml").write_text(text.replace("\n  updates: 2\n", "\n  updates: 8\n"))
    progress = Progress(two_rows(1, 2).rows, "mini", tmp_path)
    assert str(progress) == "1 of 4 runs are done, 1 begun"
    progress.start -= 60
    make_run(tmp_path, SHORT, 1)
    assert str(progress) == "2 of 4 runs are done, 1 begun, about 2 min left"  # 1.75 more at one in a minute


def test_the_table_has_the_paper_s_number_beside_ours_and_says_what_is_missing(tmp_path):
    folders = [make_run(tmp_path / "runs", LONG, seed) for seed in (1, 2)]
    text = write_table(two_rows(1, 2, 3), "mini", tmp_path / "runs", tmp_path / "out")
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
    lines, _ = read_lines(two_rows(1, 2), "mini", tmp_path)
    assert [(line.row.title, len(line.runs)) for line in lines] == [
        ("Transformer-XL", 0),
        ("Expire-Span", 1),
        ("Expire-Span", 1),
    ]


def test_an_unfinished_run_is_a_hole_with_its_reason_and_what_was_not_measured_is_not_told(tmp_path):
    folder = make_run(tmp_path / "runs", LONG, 1)
    shutil.copytree(folder, folder.with_name("seed2"))
    (folder.with_name("seed2") / "summary.json").unlink()
    row, metrics = preset_row(LONG, "Expire-Span", [1, 2]), ["test/accuracy", "perf/peak_memory_gb"]
    assert missing_seeds(row, "mini", tmp_path / "runs") == (2,)
    text = write_table(table_of(row, metrics=metrics), "mini", tmp_path / "runs", tmp_path / "out")
    assert "seed2: no summary.json: stopped, failed or still running, last logged update 2" in text
    row = preset_row("table3_adaptive_span", "Adaptive-Span", [1])  # whose peak memory the paper tells
    shutil.copytree(folder, tmp_path / "runs/mini/table3_adaptive_span/seed1")
    text = write_table(table_of(row, metrics=metrics), "mini", tmp_path / "runs", tmp_path / "out")
    assert "| 17.2 " in text
    assert "not measured" in text  # there is no GPU here


def test_a_row_that_conf_does_not_have_is_a_preset_beside_the_runs(tmp_path):
    row = next(row for row in read_table("memory_copy", "mini").rows if "model=trans_xl" in row.overrides)
    row = row._replace(seeds=(1,), overrides=(*row.overrides, "optimizer.lr=3e-05"))
    write_presets([row], "mini", tmp_path)
    with initialize_config_dir(str(files("expire_span.conf")), version_base="1.3"):
        by_overrides = compose("config", overrides=list(row.overrides))
        search_path = f"hydra.searchpath=[file://{tmp_path}/conf]"
        by_preset = compose("config", overrides=[f"experiment=mini/{row.preset}", search_path])
    assert by_preset == by_overrides
    [command] = sweeps([row], "mini", tmp_path, [*COPY, "train.updates=2"])
    assert launch(command) == 0
    folder = tmp_path / "mini" / row.preset / "seed1"
    assert load_config(folder).optimizer.lr == 3e-5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["value_sources"]["our choice"]["optimizer.lr"] == 3e-5
    assert sweeps([row], "mini", tmp_path, []) == []


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
    content = preset_content(row.overrides)
    return str(content["defaults"]), tuple(content.get("model", ())), row.is_curve


KINDS = {kind_of_settings(row): key for key, row in ROWS.items()}  # one row of each task, model and size


@pytest.mark.parametrize("row", KINDS.values(), ids=str)
def test_every_row_can_be_tuned_and_its_points_are_valid_settings(row):
    tried = points(ROWS[row])
    configs = [validate(compose_config(*point.overrides)) for point in (tried[0], tried[-1])]
    assert len({str(point.overrides) for point in tried}) == len(tried)
    of_model = factors(model_option(ROWS[row]), ROWS[row].is_curve)
    first, last = ({key: OmegaConf.select(config, key) for key in of_model} for config in configs)
    assert all(last[key] > first[key] for key in of_model)
    for config in configs:
        if config.model._target_.endswith("Compressive"):
            instantiate(config.model).check_block_size(config.train.block_size)


def test_the_point_that_is_best_in_validation_is_chosen_and_run_with_the_table_s_seeds(tmp_path):
    row = preset_row(LONG, "Expire-Span")
    tried = points(row)
    accuracies = {}
    for number in (1, 2):  # the third has not run
        preset = tried[number].preset
        folder = make_run(tmp_path, preset, 0, *tried[number].overrides[1:], experiment=tried[number].overrides[0])
        path = folder / "summary.json"
        summary = json.loads(path.read_text())
        summary["metrics"] |= {"valid/accuracy": 0.5 + number / 10, "test/accuracy": 0.9 - number / 10}
        path.write_text(json.dumps(summary))
        accuracies[number] = summary["metrics"]["valid/accuracy"]
    choice = choose(row, tried, "mini", tmp_path)
    assert (choice.finished, choice.points, choice.metric, choice.value) == (2, 6, "valid/accuracy", 0.7)
    assert choice.row.overrides == tried[2].overrides
    assert choice.row.seeds == (1, 2, 3)
    assert choice.row.preset == f"tuned/{LONG}/3"
    assert choice.settings == {"optimizer.lr": 0.002, "memory.alpha": 0.0003}
    text = describe([choice])
    assert "| Expire-Span | 2 of 6 " in text
    nothing = choose(row, tried, "mini", tmp_path / "elsewhere")
    assert nothing.row.overrides == ()  # nothing to launch
    assert sweeps([nothing.row], "mini", tmp_path, []) == []
    assert describe([nothing]).endswith("No point has been run.")


def test_a_lower_error_is_the_better_one(tmp_path):
    row = preset_row("table3_adaptive_span")
    tried = points(row)
    for number, error in ((0, 0.3), (1, 0.2)):
        folder = make_run(tmp_path, LONG, number)
        summary = json.loads((folder / "summary.json").read_text())
        summary["metrics"]["valid/error"], summary["metric"] = error, "error"
        (folder / "summary.json").write_text(json.dumps(summary))
        shutil.move(folder, tmp_path / "mini" / tried[number].preset / "seed0")
    assert choose(row, tried, "mini", tmp_path).row.overrides == tried[1].overrides


def test_settings_that_two_tables_share_are_run_once():
    figures = [read_table(name, "mini").rows for name in ("figure9", "figure10", "figure12", "figure13")]
    assert len({row.preset for rows in figures for row in rows}) == 2
    assert read_table("ablations", "mini").rows[0].preset == "table3_expire_span_64k"
    assert all(row.seeds == (1,) for rows in figures for row in rows)


def test_a_page_shows_what_the_rows_of_a_figure_remember(tmp_path):
    shown = {"text": "the end", "replacements": {"end": "beginning"}, "span_cap": {"mini": 2}, "loss_tokens": 64}
    rows = [Row(f"settings/{number}", title, (), {}, (1,)) for number, title in enumerate(("with", "without"))]
    figure = Table("figure9", "Figure 9", ["test/bpb"], rows, page=shown)
    (tmp_path / "text.txt").write_text("the end of the beginning. " * 400)
    write_table(figure, "mini", tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out/figure9.html").exists()  # the runs are missing
    for row in rows:
        folder = tmp_path / "runs/mini" / row.preset / "seed1"
        folder.mkdir(parents=True)
        config = tiny_config("train.updates=2", task="text", text=tmp_path / "text.txt")
        train(config, folder, config_files=ConfigFiles(config, {}, []).texts())
    text = write_table(figure, "mini", tmp_path / "runs", tmp_path / "out")
    assert "Mean span by kind of token, in timesteps (with, seed 1, figure9.txt):" in text
    assert (tmp_path / "out/figure9.md").read_text() == text
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "out").glob("*.[mc]*"))  # no one's paths
    html = (tmp_path / "out/figure9.html").read_text()
    assert "expire-span-paper figure9" in html
    data = json.loads(re.search(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)[1])
    assert ["".join(text["tokens"]) for text in data["texts"]] == ["the end", "the beginning"]
    assert data["span_cap"] == 2
    assert [curve["name"] for curve in data["curves"]["runs"]] == ["with", "without"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"figure9.{ending}" for ending in ("csv", "html", "md", "png", "txt")
    ]


def test_a_table_that_needs_data_of_the_user_says_so(monkeypatch):
    content = {"title": "t", "metrics": ["test/bpb"], "task": "text", "given": {"mini": ["task.path"]}}
    content["curves"] = {"mini": {"trans_xl": {"memory.max_span": [8]}}}
    monkeypatch.setattr("expire_span.paper_tables.table_content", lambda name: yaml.safe_load(yaml.safe_dump(content)))
    with pytest.raises(ValueError, match="table1 needs task.path=..., which names your data"):
        select_tables(["table1"], "mini", [], {})
    [of_user], _ = select_tables(["table1"], "mini", [], {"task.path": "'/a b'"})
    assert of_user.rows[0].overrides[-1] == "task.path='/a b'"
    tables, left_out = select_tables(["all"], "mini", [], {})
    assert tables == []
    assert set(left_out) == {f"{name} needs task.path=..., which names your data" for name in table_names()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "there is no tabel3; there are ablations, figure10,"),
        (["size=mini"], "name a table: ablations, figure10,"),
        (["table1", "size=tiny"], "size must be one of mini, paper, got tiny"),
        (["table1", "memory.alpha=1"], "memory.alpha belongs to the presets of the table"),
        (["table1", "--seeds=one"], "--seeds must be numbers with commas between them, as in 1,2,3, got one"),
        (["table1", "--seeds=0,1", "--tune"], "seed 0 is that of the tuning, which a table must not use"),
        (["memory_copy", "size=paper"], "memory_copy has no rows at size=paper"),
        (["table1", "--no-launch"], "9 runs are missing; the same command goes on with them"),
    ],
)
def test_bad_input_and_holes_are_one_line_and_a_code(arguments, message, tmp_path):
    (tmp_path / "work").mkdir()
    ended = forked_command(["expire-span-paper", *arguments], tmp_path / "work")
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert message in ended.stderr
