"""The command line: train, evaluate, resume and sweep, each as a process of its own."""

import importlib
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from forked_command import forked_command
from tiny_config import COPY, SMALL_SIZES
from wait import wait_for_lines

from expire_span.results import load_runs
from expire_span.runner import cli
from expire_span.runner.config.overrides import quote
from expire_span.runner.run_folder import checkpoint
from expire_span.runner.run_folder.config_files import load_config
from expire_span.runner.run_folder.files import lock, read_metrics


def run_command(*overrides, folder, cwd=None, environment=()):
    """The command with a folder for its run, in a forked process."""
    command = ["expire-span", *overrides, f"hydra.run.dir={folder}"]
    with tempfile.TemporaryDirectory() as elsewhere:
        return forked_command(command, cwd or Path(elsewhere), 120, environment)


def contents(folder):
    """What lies in a run folder, but for what each command writes there."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.log", ".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def losses(folder):
    return {row["update"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}


# Evaluate


def test_evaluating_a_run_gives_the_metrics_that_training_ended_with(folder, tmp_path):
    trained = run_command("task=copy", *COPY, folder=folder)
    assert trained.code == 0, trained.stderr
    evaluated = run_command(f"evaluate={folder}", "eval.splits=[test]", folder=tmp_path / "evaluated")
    assert evaluated.code == 0, evaluated.stderr
    first, second = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "evaluated"))
    assert first["metrics"]["test/loss"] == second["metrics"]["test/loss"]
    evaluate = ["expire-span", f"evaluate={folder}"]
    assert forked_command([*evaluate, "eval.splits=[test]"], tmp_path).code == 0
    assert [path.parent.name[9:] for path in tmp_path.glob("runs/*/*/summary.json")] == ["evaluate-run"]
    shown = forked_command([*evaluate, "--cfg", "job"], tmp_path)
    assert f"uses the run's own config, which --cfg cannot show: see {folder}/.hydra/config.yaml" in shown.stderr
    listed = forked_command([*evaluate, "--info", "defaults"], tmp_path)
    assert "Defaults List" in listed.stdout  # Hydra takes no override after a flag
    longer = ["task.episode_length=128", "eval.max_blocks=null"]
    farther = run_command(f"evaluate={folder}", *longer, folder=tmp_path / "farther")
    assert farther.code == 0, farther.stderr
    summary = json.loads((tmp_path / "farther" / "summary.json").read_text())
    assert "test/accuracy_distance_64_128" in summary["metrics"]


def test_evaluation_knows_the_keys_of_the_run_and_refuses_others(folder, tmp_path, text):
    overrides = ["task=text", f"task.path={text}", "memory.max_span=32", *SMALL_SIZES]
    assert run_command(*overrides, folder=folder).code == 0
    larger = ["task.test_fraction=0.2", "eval.splits=[test]"]
    evaluated = run_command(f"evaluate={folder}", *larger, folder=tmp_path / "larger")
    assert evaluated.code == 0, evaluated.stderr
    summary = json.loads((tmp_path / "larger" / "summary.json").read_text())
    assert summary["config"]["task"]["test_fraction"] == 0.2
    wrong_overrides = {
        "task.episode_length=64": "task.episode_length is not in the config",
        "task=copy": "omit task=copy",
        "eval.weights=best": "best.safetensors does not exist",
    }
    for override, message in wrong_overrides.items():
        refused = run_command(f"evaluate={folder}", override, folder=tmp_path / "refused")
        assert refused.code == 1
        assert message in refused.stderr
        assert not (tmp_path / "refused").exists()


# Resume


def test_a_run_of_before_some_keys_were_added_is_resumed_and_evaluated_also_with_these_keys(folder, tmp_path):
    assert run_command("task=copy", *COPY, folder=folder).code == 0
    path = folder / ".hydra" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["tracker"], config["milestones"], config["memory"]["budget"], config["wandb"]["log_model"]
    path.write_text(yaml.safe_dump(config))
    (folder / ".hydra" / "overrides.yaml").write_text("[task=copy]")  # an unmodified recipe, which has milestones now
    evaluated = run_command(f"evaluate={folder}", "eval.splits=[test]", "tracker=none", folder=tmp_path / "evaluated")
    assert evaluated.code == 0, evaluated.stderr
    assert json.loads((tmp_path / "evaluated" / "summary.json").read_text())["trained"] == {
        "eval.splits": ["valid", "test"]
    }
    for override in ([], ["tracker=none"]):
        resumed = forked_command(["expire-span", f"resume={folder}", *override], tmp_path, 120)
        assert resumed.code == 0, resumed.stderr
    assert load_config(folder).tracker == "none"
    refused = forked_command(["expire-span", f"resume={folder}", "memory.budget=40"], tmp_path, 120)
    assert "resume=RUN keeps the run's own memory.budget" in refused.stderr


@pytest.mark.slow
def test_a_killed_run_resumes_from_the_command_line_to_the_same_losses(tmp_path):
    overrides = [*COPY, "train.updates=400", "run.log_every=1"]
    folder = tmp_path / "killed"

    def kill(process):
        wait_for_lines(folder / "metrics.jsonl", lines=20)
        os.kill(process, signal.SIGKILL)

    killed = forked_command(["expire-span", *overrides, f"hydra.run.dir={folder}"], tmp_path, during=kill)
    assert killed.code == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    resumed = run_command(f"resume={folder}", "train.updates=60", folder=folder)
    assert resumed.code == 0, resumed.stderr
    uninterrupted = run_command(*overrides, "train.updates=60", folder=tmp_path / "uninterrupted")
    assert uninterrupted.code == 0, uninterrupted.stderr
    expected = losses(tmp_path / "uninterrupted")
    assert len(expected) == 60
    assert losses(folder) == expected


def test_a_run_with_config_files_of_the_users_own_resumes_with_them(tmp_path):
    (tmp_path / "mine/task").mkdir(parents=True)
    text = (Path(cli.__file__).parents[2] / "conf/task/copy.yaml").read_text()
    (tmp_path / "mine/task/mine.yaml").write_text(text)
    config_dir = ["--config-dir", str(tmp_path / "mine")]
    first = run_command(*config_dir, "task=mine", *COPY, "train.updates=2", folder=tmp_path / "run")
    assert first.code == 0, first.stderr
    for arguments, update in ((["train.updates=3"], 3), ([*config_dir, "train.updates=4"], 4)):
        resumed = run_command(f"resume={tmp_path / 'run'}", *arguments, folder=tmp_path / "run")
        assert resumed.code == 0, resumed.stderr
        assert checkpoint.load(tmp_path / "run")["update"] == update


def test_a_run_does_not_resume_with_what_contradicts_it_and_its_folder_stays_as_it_was(folder):
    assert run_command(*COPY, folder=folder).code == 0
    before = contents(folder)
    assert {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "summary.json"} <= before.keys()
    messages = {
        "train.updates=2": "has done 4 updates, more than train.updates=2",
        "train.batch_size=8": "keeps the run's own train.batch_size",
        "transformer.hidden_size=32": "keeps the run's own transformer.hidden_size",
        "seed=7": "omit seed=7",
        "model=trans_xl": "omit model=",
    }
    for override, message in messages.items():
        refused = run_command(f"resume={folder}", override, folder=folder)
        assert refused.code == 1
        assert re.search(f"^error: .*{re.escape(message)}", refused.stderr), refused.stderr
        assert contents(folder) == before, override
    evaluated_into_itself = run_command(f"evaluate={folder}", folder=folder)
    assert "evaluate into another hydra.run.dir" in evaluated_into_itself.stderr


@pytest.mark.slow
def test_a_folder_with_special_characters_in_its_name_can_be_resumed_and_evaluated(tmp_path):
    folder, other = tmp_path / "it's (1) lr=1,x", tmp_path / "${x}"
    assert run_command(*COPY, "train.updates=2", folder=quote(str(folder))).code == 0
    other.symlink_to(folder)
    messages = {
        f"resume={folder}": "",
        f"evaluate={other}": "",
        f"resume={other}": "Hydra cannot work in a folder with",
    }
    for argument, message in messages.items():
        finished = forked_command(["expire-span", argument, "eval.splits=[test]"], tmp_path)
        assert finished.code == bool(message), finished.stderr
        assert message in finished.stderr
    assert len(list(tmp_path.glob("runs/*/*-evaluate-*/summary.json"))) == 1


def test_what_a_variable_of_the_environment_holds_is_not_told_by_the_command_of_the_summary(tmp_path):
    secret = {"KEY": "se,cr=e(t#'{"}  # and no character of it is read as a part of the override
    overrides = [*COPY, "train.updates=2", "wandb.entity=${oc.env:KEY}"]
    assert run_command(*overrides, folder=tmp_path / "run", environment=secret).code == 0
    assert "se,cr" not in (tmp_path / "run/summary.json").read_text()
    assert run_command("resume=run", "train.updates=3", folder=tmp_path / "run", cwd=tmp_path).code == 0
    assert load_config(tmp_path / "run").wandb.entity == "se,cr=e(t#'{"


def test_a_run_folder_of_a_version_with_other_names_is_refused_with_what_to_do(folder, tmp_path):
    assert run_command(*COPY, "train.updates=2", folder=folder).code == 0
    path = folder / ".hydra/config.yaml"
    path.write_text(path.read_text().replace("optimizer:", "optimiser:"))
    for command, into in (("resume", folder), ("evaluate", tmp_path / "evaluated")):
        refused = run_command(f"{command}={folder}", folder=into)
        assert refused.code == 1
        assert "was written by expire-span 0.1" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


# Sweeps


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own_and_reports_those_that_fail(tmp_path):
    overrides = ["-m", *COPY, "model=trans_xl,expire_span", "train.batch_size=4,0", "train.updates=2"]
    swept = run_command(*overrides, f"hydra.sweep.dir={tmp_path}/sweep", folder=tmp_path / "unused")
    assert swept.code == 1
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    assert [(summary["model"], summary["config"]["train"]["batch_size"]) for summary in summaries] == [
        ("expire_span", 4),
        ("trans_xl", 4),
    ]
    problems = "\n".join(load_runs(tmp_path / "sweep").problem)
    for number in (2, 3):  # batch_size=4 of both models comes first
        problem = f"job {number} failed: train.batch_size must be at least 1, got 0"
        assert problem in swept.stdout
        assert problem in problems


def test_a_sweep_does_not_resume(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["expire-span", "-m", "resume=somewhere"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit, match="resume=RUN resumes a single run; omit -m"):
        cli.main()


# Bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=trans_xl"], "modle"),
        (["train.updates=many"], "train.updates: Value 'many'"),
        (["optimiser.lr=1e-3"], "optimiser.lr is called optimizer.lr since version 0.2"),
        (["task=text", "task.path=nowhere.txt"], "task.path=nowhere.txt does not exist"),
        (["evaluate=nowhere"], "nowhere is not a run folder"),
        (["resume=nowhere"], "nowhere is not a run folder"),
        (["recipe=copy/TYPO"], "recipe=copy/TYPO does not exist"),
        (["experiment=table3_expire_spam_64k"], "does not exist; did you mean table3_expire_span_64k"),
        (["seed=1,2"], "seed has several values; add -m"),
        (["run.device=tpu"], "run.device=tpu is not available here"),
        (["model=compressive", "model.max_span=8"], "max_span=8 is too short for blocks of 32"),
        (["experiment=table1_expire_span_128k", "size=mini"], "brings its own size; omit size=mini"),
        (["experiment=table1_expire_span_128k", "task=collision"], "brings its own task; omit task=collision"),
        (["model=trans_xl", "experiment=table1_expire_span_128k"], "brings its own model; omit model=trans_xl"),
        (["experiment=table5_expire_span", "recipe=copy/mini"], "brings its own recipe; omit recipe=copy/mini"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_reported_in_one_line_that_names_the_value(overrides, message, tmp_path):
    result = run_command(*overrides, "wandb.mode=disabled", folder=tmp_path / "run", cwd=tmp_path)
    assert result.code == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    left = [path.name for path in (tmp_path / "run").glob("*")]
    assert left in ([], ["run.log"])  # nothing that looks like a run


@pytest.mark.parametrize(
    "arguments",
    [
        ["task=text", "task.path=nowhere.txt"],
        ["task.episode_length=2"],  # which the task refuses
        ["memory.alpha=-1", "hydra.run.dir=a/folder/of/folders"],
        ["evaluate=nowhere"],
        ["-m", "model=expire_span,tran_xl"],
        ["-m", "model=expire_span,tran_xl", "hydra.sweep.dir=a/folder"],
    ],
    ids=" ".join,
)
def test_a_start_that_is_refused_leaves_no_folder(arguments, tmp_path):
    (tmp_path / "work").mkdir()
    result = forked_command(["expire-span", *arguments], tmp_path / "work", 120)
    assert result.code == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_an_empty_folder_of_before_a_start_that_is_refused_stays(tmp_path):
    (tmp_path / "of the user").mkdir()
    assert run_command("memory.alpha=-1", folder=f"'{tmp_path}/of the user/run'").code == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "of the user"]
    assert list((tmp_path / "of the user").iterdir()) == []


def test_a_run_folder_in_use_is_refused(folder):
    with lock(folder):
        result = run_command("wandb.mode=disabled", folder=folder)
    assert result.code == 1
    assert f"in use by process {os.getpid()}" in result.stderr


@pytest.mark.parametrize("command", ["dashboard", "generate", "paper", "plan", "play", "report", "spans"])
def test_a_flag_that_is_cut_short_is_refused_and_not_guessed(command, capsys, monkeypatch):
    main = importlib.import_module(f"expire_span.runner.commands.{command}").main
    monkeypatch.setattr(sys, "argv", ["command", "--hel"])  # argparse would take it for --help, and --tun for --tune
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "usage: expire-span-" in capsys.readouterr().err
