"""The paper's tables by one command: what is missing is run, once; the paper's numbers stand beside ours."""

import json
import os
import re
import signal
import time
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
import yaml
from forked_command import forked_command
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tiny_config import tiny_config
from tiny_tables import LONG, SHORT, TINY, all_rows, preset_row, table_of, two_rows

from expire_span.paper_rows import Row, load_row, missing_seeds, paper_numbers, preset_content, row_config
from expire_span.paper_sweeps import Progress, launch, sweeps, write_presets
from expire_span.paper_tables import SIZES, Table, csv_rows, read_lines, read_table, table_content, table_names
from expire_span.runner.commands.paper import content_hash, distinct_rows, main, select_tables, text_path, write_table
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.config_files import ConfigFiles, load_config
from expire_span.runner.train import train

ROWS = all_rows()
PRESETS = dict.fromkeys(row.preset for row in ROWS.values() if row.overrides == (f"experiment={row.preset}",))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_is_the_same_task_and_model_at_each_size(preset):
    small, large = (preset_content([f"experiment={name}"])["defaults"] for name in (f"mini/{preset}", preset))
    assert [choice for choice in small if "override /size" not in choice] == [
        choice for choice in large if "override /size" not in choice
    ]
    assert small != large
    config = validate(row_config(ROWS["mini", preset].overrides))
    if config.model._target_.endswith("Compressive"):
        instantiate(config.model).check_block_size(config.train.block_size)


@pytest.mark.parametrize("name", table_names())
def test_a_table_has_a_column_for_every_number_of_the_paper(name):
    table = next(table for size in SIZES if (table := read_table(name, size)).rows)
    numbers = [metric for row in table.rows for metric in row.paper]
    costs = {"perf/peak_memory_gb", "perf/ms_per_batch"}  # of table 4, which a row of table 3 may have, too
    assert set(numbers) - costs <= set(table.metrics)
    assert not name.startswith("table") or all(row.paper for row in table.rows)


def test_what_is_missing_is_run_once_and_then_nothing(tmp_path, monkeypatch):
    """Also where a row is no preset of conf/, in a folder with odd characters, and if it diverges."""
    monkeypatch.chdir(tmp_path)
    runs = Path("my runs, here")
    row = next(row for row in read_table("memory_copy", "mini").rows if "model=trans_xl" in row.overrides)
    row = row._replace(seeds=(1,), overrides=(*row.overrides, *TINY[1:], "optimizer.lr=3e-05"))
    diverging = row._replace(preset="diverging", overrides=(*row.overrides[:-1], "optimizer.lr=1e30"))
    write_presets([row, diverging], "mini", runs)
    with initialize_config_dir(str(files("expire_span.conf")), version_base="1.3"):
        by_overrides = compose("config", overrides=list(row.overrides))
        search_path = f"hydra.searchpath=['file://{tmp_path}/{runs}/conf']"
        by_preset = compose("config", overrides=[f"experiment=mini/{row.preset}", search_path])
    assert by_preset == by_overrides == row_config(row.overrides)
    [command] = sweeps([row, row, diverging], "mini", runs, [])  # a row that two tables share is run once
    assert launch(command) == 1
    folder = runs / "mini" / row.preset / "seed1"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["value_sources"]["our choice"]["optimizer.lr"] == 3e-5
    assert load_config(folder).wandb.group == f"mini/{row.preset}"  # what W&B averages over
    assert load_row(row, "mini", runs)["problem"].tolist() == [""]
    assert "train/loss is nan at update 2" in load_row(diverging, "mini", runs)["problem"].item()
    assert sweeps([row, diverging], "mini", runs, []) == []  # it would diverge again
    [command] = sweeps([row._replace(seeds=(1, 2, 3))], "mini", runs, [])
    assert f"experiment=mini/{row.preset}" in command
    assert "seed=2,3" in command


def test_rows_that_lack_the_same_seeds_are_one_sweep(tmp_path, make_run):
    runs = tmp_path / "runs"
    folder = make_run(preset_row(LONG), 1)
    first, second = sweeps(two_rows(1, 2).rows, "mini", runs, [])
    assert [f"experiment=mini/{SHORT}", "seed=1,2"] == first[1:3]
    assert [f"experiment=mini/{LONG}", "seed=2"] == second[1:3]
    (folder / "summary.json").write_text("{")  # a run that was cut short, or damaged
    [both] = sweeps(two_rows(1, 2).rows, "mini", runs, [])
    assert [f"experiment=mini/{SHORT},mini/{LONG}", "seed=1,2"] == both[1:3]


def test_the_progress_counts_the_updates_of_runs_that_have_begun(tmp_path, make_run):
    make_run(preset_row(LONG), 1)
    begun = make_run(preset_row(LONG), 2)
    (begun / "summary.json").unlink()
    text = (begun / ".hydra/config.yaml").read_text()
    (begun / ".hydra/config.yaml").write_text(text.replace("\n  updates: 2\n", "\n  updates: 8\n"))
    progress = Progress(two_rows(1, 2).rows, "mini", tmp_path / "runs")
    assert str(progress) == "1 of 4 runs are done, 1 begun"
    progress.start -= 60
    make_run(preset_row(SHORT), 1)
    assert str(progress) == "2 of 4 runs are done, 1 begun, about 2 min left"  # 1.75 more at one in a minute
    (begun / "metrics.jsonl").write_text('{"update": "two"}\n')
    assert str(progress).startswith("2 of 4 runs are done, 0 begun")  # a damaged file does not end the sweep


def test_the_table_has_the_paper_s_number_beside_ours_and_says_what_is_missing(tmp_path, make_run):
    for seed, accuracy in ((1, 0.5), (2, 0.7)):
        make_run(preset_row(LONG), seed, {"test/accuracy": accuracy})
    text, holes = write_table(two_rows(1, 2, 3), "mini", tmp_path / "runs", tmp_path / "out")
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:]]
        for row in text.splitlines()
        if row.startswith("| ")
    }
    assert rows["Transformer-XL"][:3] == ["26.7", "not run", "0 of 3"]
    assert rows["Expire-Span"][:3] == ["52.1", "60 ± 14", "2 of 3"]
    assert holes == 4
    assert "2 runs on cpu, float32, commit " in text
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["table1.csv", "table1.md", "table1.png", "table1.svg"]
    assert (tmp_path / "out/table1.md").read_text() == text
    csv = pd.read_csv(tmp_path / "out/table1.csv")
    assert csv["preset"].tolist() == [SHORT, LONG, LONG]  # a line for the row that was not run, and for each run
    assert csv["folder"].dropna().tolist() == [f"mini/{LONG}/seed{seed}" for seed in (1, 2)]
    assert csv["test/accuracy"].dropna().tolist() == [0.5, 0.7]
    assert csv["planned_seeds"].tolist() == [3, 3, 3]


def test_a_run_that_was_far_behind_its_recipe_is_named_beneath_the_table(tmp_path, make_run):
    make_run(preset_row(LONG), 1)
    folder = make_run(preset_row(LONG), 2)
    summary = json.loads((folder / "summary.json").read_text())
    summary["far_behind"] = ["train/accuracy is 0.2 at update 56, where this recipe had 0.8"]
    (folder / "summary.json").write_text(json.dumps(summary))
    text, _ = write_table(two_rows(1, 2), "mini", tmp_path / "runs", tmp_path / "out")
    [line] = [line for line in text.splitlines() if "far behind" in line]
    assert line == f"- Expire-Span, seed 2, was far behind its recipe: {summary['far_behind'][0]}."


def test_runs_of_one_row_with_different_settings_are_shown_and_not_averaged(tmp_path, make_run):
    """That is where the preset is the same, but not how it was run: on other devices, in another precision."""
    make_run(preset_row(LONG), 1)
    folder = make_run(preset_row(LONG), 2)
    summary = json.loads((folder / "summary.json").read_text())
    summary["protocol"]["precision"] = "bfloat16"
    (folder / "summary.json").write_text(json.dumps(summary))
    lines, _ = read_lines(two_rows(1, 2), "mini", tmp_path / "runs")
    assert [(line.row.title, len(line.runs)) for line in lines] == [
        ("Transformer-XL", 0),
        ("Expire-Span", 1),
        ("Expire-Span", 1),
    ]
    csv = csv_rows(lines, tmp_path / "runs")
    assert csv["line"].tolist() == [1, 1, 2]  # by which `claims` knows them


def test_a_run_that_was_made_before_a_key_existed_is_one_of_its_row(tmp_path, make_run):
    folder = make_run(preset_row(LONG), 1)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["config"]["actor_critic"]["bootstrap_truncated"]
    (folder / "summary.json").write_text(json.dumps(summary))
    lines, _ = read_lines(two_rows(1), "mini", tmp_path / "runs")
    assert [len(line.runs) for line in lines] == [0, 1]
    summary["config"]["actor_critic"]["bootstrap_truncated"] = True
    (folder / "summary.json").write_text(json.dumps(summary))
    lines, _ = read_lines(two_rows(1), "mini", tmp_path / "runs")
    assert [len(line.runs) for line in lines] == [0, 0]


def test_a_run_of_a_preset_that_has_changed_since_is_no_run_of_its_row(tmp_path, make_run):
    make_run(preset_row(LONG), 1)
    make_run(preset_row(LONG, settings=(*TINY, "memory.alpha=0.5")), 2)
    text, holes = write_table(two_rows(1, 2), "mini", tmp_path / "runs", tmp_path / "out")
    assert f"Not in the table: mini/{LONG}/seed2: its settings are no longer those of the row: " in text
    assert "alpha was 0.5 and is 0.001 now; move its folder away, and the same command runs it anew" in text
    assert holes == 3
    [command] = sweeps([preset_row(LONG, seeds=(1, 2, 3))], "mini", tmp_path / "runs", [])
    assert "seed=3" in command  # nothing is written over


def test_only_the_seeds_of_the_table_count(tmp_path, make_run):
    make_run(preset_row(LONG), 1)
    table = read_table("table1", "mini", [2, 3])
    assert table.command == "expire-span-paper table1 size=mini --seeds 2,3"
    lines, left_out = read_lines(table_of(preset_row(LONG, seeds=(2, 3))), "mini", tmp_path / "runs")
    assert lines[0].runs.empty
    assert left_out == [f"mini/{LONG}/seed1: no seed of this table: 1"]


def test_an_unfinished_run_is_a_hole_with_its_reason_and_what_was_not_measured_is_not_told(tmp_path, make_run):
    row, metrics = preset_row(LONG, "Expire-Span", [1, 2, 3]), ["test/accuracy", "perf/peak_memory_gb"]
    make_run(row, 1)
    (make_run(row, 2) / "summary.json").unlink()
    make_run(row, 3, {"test/accuracy": float("nan")})
    assert missing_seeds(row, "mini", tmp_path / "runs") == (2,)
    text, holes = write_table(table_of(row, metrics=metrics), "mini", tmp_path / "runs", tmp_path / "out")
    assert f"mini/{LONG}/seed2: no summary.json: stopped, failed or still running, last logged update 2" in text
    assert f"mini/{LONG}/seed3: summary.json has metrics that are not finite numbers" in text
    assert holes == 2
    row = preset_row(LONG, "Adaptive-Span", [1])._replace(paper=paper_numbers("table3_adaptive_span"))
    text, _ = write_table(table_of(row, metrics=metrics), "mini", tmp_path / "runs", tmp_path / "out")
    assert "| 17.2 " in text  # the paper's peak memory
    assert "not measured" in text  # there is no GPU here


def test_settings_that_two_tables_share_are_run_once():
    figures = [read_table(name, "mini").rows for name in ("figure9", "figure10", "figure12", "figure13")]
    assert len({row.preset for rows in figures for row in rows}) == 2
    assert read_table("ablations", "mini").rows[0].preset == "table3_expire_span_64k"
    assert [rows[0].seeds for rows in figures] == [(1,), (1, 2, 3), (1, 2, 3), (1,)]
    tables = [read_table(name, "mini") for name in ("figure9", "figure12", "figure13")]
    assert [row.seeds for row in distinct_rows(tables)] == [(1, 2, 3), (1,)]  # all that one of the tables needs


def test_a_page_shows_what_the_rows_of_a_figure_remember(tmp_path):
    shown = {"text": "the end", "replacements": {"end": "beginning"}, "span_cap": {"mini": 2}, "loss_tokens": 64}
    rows = [Row(f"settings/{number}", title, (), {}, (1,)) for number, title in enumerate(("with", "without"))]
    figure = Table("figure9", "Figure 9", ["test/bpb"], rows, page=shown, command="expire-span-paper figure9")
    (tmp_path / "text.txt").write_text("the end of the beginning. " * 400)
    write_table(figure, "mini", tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out/figure9.html").exists()  # the runs are missing
    for row in rows:
        folder = tmp_path / "runs/mini" / row.preset / "seed1"
        folder.mkdir(parents=True)
        config = tiny_config("train.updates=2", task="text", text=tmp_path / "text.txt")
        train(config, folder, config_files=ConfigFiles(config, {}, []).texts())
    text, _ = write_table(figure, "mini", tmp_path / "runs", tmp_path / "out")
    assert "Mean span by kind of token, in timesteps (with, seed 1, figure9.txt):" in text
    kinds = pd.read_csv(tmp_path / "out/figure9.csv")  # of each run, by which the claims are judged
    [shown_in_text] = [line.split("|") for line in text.splitlines() if line.startswith("| all ")]
    assert kinds["span/all"].notna().all()
    assert float(shown_in_text[5]) == pytest.approx(kinds["span/all"][0], rel=1e-3)
    assert kinds["more_bits/all"].notna().all()
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
    (folder / "model.safetensors").unlink()  # as of a run that --from-wandb has fetched
    write_table(figure, "mini", tmp_path / "runs", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere/figure9.html").exists()
    assert pd.read_csv(tmp_path / "elsewhere/figure9.csv")["span/all"].notna().tolist() == [True, False]


def test_a_table_that_needs_data_of_the_user_says_so(monkeypatch, tmp_path):
    content = {"title": "t", "metrics": ["test/bpb"], "task": "text", "given": {"mini": ["task.path"]}}
    content["curves"] = {"mini": {"trans_xl": {"memory.max_span": [8]}}}
    monkeypatch.setattr("expire_span.paper_tables.table_content", lambda name: yaml.safe_load(yaml.safe_dump(content)))
    with pytest.raises(ValueError, match="table1 needs task.path=FILE, your text"):
        select_tables(["table1"], "mini", [], None)
    text, other = tmp_path / "a b.txt", tmp_path / "other"
    text.write_text("one")
    other.mkdir()
    (other / "file").write_text("two")
    presets = {}
    for path in (text, other):  # runs of one text are none of another
        [of_user], _ = select_tables(["table1"], "mini", [], path)
        assert of_user.rows[0].overrides[-1] == f"task.path='{path}'"
        presets[of_user.rows[0].preset] = content_hash(path)
    assert list(presets) == [f"table1/trans_xl_8-{content_hash(path)}" for path in (text, other)]
    tables, left_out = select_tables(["all"], "mini", [], None)
    assert tables == []
    assert set(left_out) == {f"{name} needs task.path=FILE, your text" for name in table_names()}
    assert text_path([f"task.path={text}"]) == text_path([f"task.path='{text}'"]) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "there is no tabel3; there are ablations, figure10,"),
        (["size=mini"], "name a table: ablations, figure10,"),
        (["table1", "size=tiny"], "size must be one of mini, paper, got tiny"),
        (["table1", "memory.alpha=1"], "memory.alpha belongs to the presets of the table"),
        (["table1", "--seeds=one"], "--seeds must be numbers with commas between them, as in 1,2,3, got one"),
        (["table1", "--seeds=0,1", "--tune"], "seed 0 is that of the tuning, which a table must not use"),
        (["figure9", "task.path=none.txt"], "error: none.txt: No such file or directory"),
        (["table1", "task.data_dir=data"], "EXPIRE_SPAN_CACHE says where data lies"),
        (["table1", "hydra.sweep.dir=elsewhere"], "hydra.sweep.dir is how this command finds its runs; --runs"),
        (["table1", "--out=/dev/null"], "error: /dev/null/mini: Not a directory"),  # and no run is started for nothing
        (["claims"], "there are no tables in results: make some first"),
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
    assert "--no-launch" in arguments or not any((tmp_path / "work").iterdir())  # nothing was begun


def test_a_table_that_cannot_be_made_is_told_at_the_end_and_the_others_are_made(tmp_path):
    work = tmp_path / "work"
    for table in ("figure5", "table6"):
        (work / f"out/mini/{table}.md").mkdir(parents=True)  # where a file is to be written
    ended = forked_command(["expire-span-paper", "figure5", "table6", "table5", "--no-launch", "--out=out"], work)
    assert ended.code == 1
    assert ended.stderr.splitlines() == [
        "error: figure5: out/mini/figure5.md: Is a directory",
        "error: table6: out/mini/table6.md: Is a directory",
        "error: 33 runs are missing; the same command goes on with them",
    ]
    assert "# Table 5" in ended.stdout
    assert (work / "out/mini/table5.md").is_file()


def test_a_row_that_hydra_cannot_compose_leaves_out_its_own_table_only(monkeypatch, capsys):
    broken = {"title": "t", "metrics": ["test/bpb"], "settings": {"mini": {"one": "task=copy model=tran_xl"}}}
    monkeypatch.setattr(
        "expire_span.paper_tables.table_content",
        lambda name: yaml.safe_load(yaml.safe_dump(broken)) if name == "table1" else table_content(name),
    )
    with pytest.raises(SystemExit, match="^error: table1: model=tran_xl does not exist; did you mean trans_xl?"):
        main(["table1", "table5", "--dry-run"])
    assert "experiment=mini/table5_expire_span seed=1,2,3" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_tables_that_are_still_to_be_made(number, tmp_path):
    """While the first waits for somebody to read what is written."""
    work = tmp_path / "work"
    (work / "out/mini").mkdir(parents=True)
    os.mkfifo(work / "out/mini/table5.md")

    def stop(process):
        picture, deadline = work / "out/mini/table5.png", time.time() + 60  # which is written last but for the table
        while not (picture.exists() and picture.read_bytes().endswith(b"IEND\xaeB`\x82")):
            assert time.time() < deadline
            time.sleep(0.05)
        os.kill(process, number)

    ended = forked_command(["expire-span-paper", "table5", "table6", "--no-launch", "--out=out"], work, during=stop)
    assert ended.code == 128 + number
    assert ended.stderr == "stopped\n"
    assert not (work / "out/mini/table6.md").exists()
