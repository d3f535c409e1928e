"""A run from end to end: what it leaves, how it goes on, and what it does with bad luck."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import SHRUNK, TASKS, tiny

from expire_span.kernels import packed_cpp
from expire_span.runner import checkpoint
from expire_span.runner import main as console
from expire_span.runner.loop import interval, train, train_update
from expire_span.runner.prediction import evaluate
from expire_span.runner.record import append_metrics, read_metrics
from expire_span.runner.report import load_runs, table
from expire_span.runner.training import Training

MODELS = ("trans_xl", "adaptive_span", "compressive", "expire_span")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} bottles of beer on the wall, {number} bottles. " for number in range(300)))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def command(*overrides, folder, cwd=None, **more):
    """The console command in a process of its own."""
    arguments = [sys.executable, "-m", "expire_span", *overrides, f"hydra.run.dir={folder}"]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=120, check=False, **more)


def losses(folder):
    return {row["update"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}


def test_the_first_time_a_batch_after_going_on_is_of_the_batches_since(folder, monkeypatch):
    train(tiny(), folder)
    training = Training(tiny("train.updates=9999"), folder)
    assert training.restore()
    before = training.blocks
    monkeypatch.setattr(training.watch, "read", lambda: 100.0)
    train_update(training)
    assert interval(training)["perf/ms_per_batch"] == 100.0 / (training.blocks - before)


def test_ctrl_c_outside_the_training_ends_a_run_with_a_word(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["expire-span"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it, and what is set here is taken back
    monkeypatch.setattr(console, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_form_of_the_attention_that_cannot_be_had_is_refused_before_the_training(folder, monkeypatch):
    monkeypatch.setattr(packed_cpp, "available", lambda: False)
    with pytest.raises(ValueError, match="kernel='cpp' is for a CPU, and needs a C"):
        train(tiny("transformer.kernel=cpp"), folder)
    assert not (folder / "metrics.jsonl").exists()


def test_a_run_leaves_figures_protocol_and_a_checkpoint(folder):
    figures = train(tiny(), folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["figures"]["test/accuracy"] == figures["test/accuracy"]
    assert {"commit", "versions", "command"} <= set(summary)
    assert summary["protocol"]["attention"] in ("cpp", "torch")
    assert summary["protocol"]["tokens"] == 4 * 16 * checkpoint.load(folder)["blocks"]
    assert (folder / "checkpoint.pt").exists()
    row = read_metrics(folder / "metrics.jsonl")[0]
    expected = {"train/loss", "train/accuracy", "memory/size", "memory/size_layer_1", "memory/span", "memory/bytes"}
    assert expected | {"perf/ms_per_batch", "perf/tokens_per_second", "perf/peak_resident_gb"} <= set(row)


def test_memory_in_training_is_that_of_all_timesteps_and_not_only_where_something_is_asked(folder):
    whole = ["model=trans_xl", "task.first_distance=64", "run.log_every=4"]  # asked in the last of four blocks
    train(tiny(*whole), folder)
    row = read_metrics(folder / "metrics.jsonl")[0]
    assert row["memory/size"] == pytest.approx(sum(min(t, 32) for t in range(64)) / 64)  # L = 32


def test_a_finished_run_that_is_started_again_keeps_the_peak_of_its_training(folder):
    train(tiny(), folder)
    path = folder / "metrics.jsonl"
    rows = read_metrics(path)
    path.unlink()
    for row in rows:  # as if the training had needed more than what comes after it
        append_metrics(path, row | ({"perf/peak_resident_gb": 123.0} if row["update"] == 2 else {}))
    assert train(tiny(), folder)["perf/peak_resident_gb"] == 123.0
    assert len(read_metrics(path)) == len(rows)  # and its figures are there once


@pytest.mark.parametrize("wrong", ["train.updates=2", "train.batch=8", "transformer.hidden_size=32"])
def test_a_start_that_is_refused_leaves_the_run_as_it_was(wrong, folder, tmp_path):
    overrides = ["memory.max_span=32", *SHRUNK, *TASKS["copy"]]
    assert command(*overrides, folder=folder).returncode == 0
    before = {path.name: path.read_bytes() for path in (folder / ".hydra").iterdir()}
    assert set(before) == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    refused = subprocess.run(
        [sys.executable, "-m", "expire_span", f"resume={folder}", wrong], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    why = "more than train.updates=2|with train.batch=4|checkpoint of another model"
    assert re.search(f"^error: .*({why})", refused.stderr)
    assert {path.name: path.read_bytes() for path in (folder / ".hydra").iterdir()} == before
    into = command(f"evaluate={folder}", folder=folder)
    assert "evaluate into another hydra.run.dir" in into.stderr


def test_a_folder_goes_on_with_its_own_seed_only(folder):
    train(tiny("train.updates=2"), folder)
    with pytest.raises(ValueError, match="holds a run with seed=1; use another"):
        train(tiny("seed=2"), folder)


@pytest.mark.parametrize("block", [1, 16, 64, 200])
def test_memory_in_evaluation_is_the_mean_over_timesteps_whatever_the_block(block, folder, text):
    text.write_text("ab c" * 365)  # of which 73 are the validation part
    whole = ["evaluation.batch=1", "evaluation.blocks=null", f"evaluation.block={block}", "splits=[valid]"]
    figures = train(tiny("model=trans_xl", *whole, task="text", text=text), folder)
    assert figures["valid/memory/size"] == pytest.approx(sum(min(t, 32) for t in range(72)) / 72)  # L = 32


@pytest.mark.parametrize("task", ["copy", "collision", "text"])
@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_run_goes_on_to_the_same_losses_bit_for_bit(model, task, tmp_path, text, monkeypatch):
    monkeypatch.setenv("EXPIRE_SPAN_CACHE", str(tmp_path / "cache"))
    dropout = ["transformer.dropout=0.1", "memory.random_drop=true"]
    config = tiny(f"model={model}", "train.updates=6", *dropout, task=task, text=text)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for each in (whole, halves):
        each.mkdir()
    train(config, whole)
    stopped = Training(config, halves)
    for _ in range(3):  # in the middle of a logging interval
        step(stopped)
    stopped.save()
    train(config, halves)
    assert losses(halves) == {update: loss for update, loss in losses(whole).items() if update > 2}
    ends = [checkpoint.load(each) for each in (whole, halves)]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name]), name


def step(training):
    from expire_span.runner.loop import interval, train_update

    train_update(training)
    if training.update % training.config.run.log_every == 0:
        interval(training)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_every_precision_trains_with_spans_of_at_least_float32(precision, folder):
    training = Training(tiny(f"run.precision={precision}"), folder)
    step(training)
    assert math.isfinite(training.meter.values()["train/loss"][0])
    width = torch.float64 if precision == "float64" else torch.float32
    assert training.model.layers[0].memory.bias.grad is None  # zeroed
    assert {parameter.dtype for parameter in training.model.parameters()} == {width}
    assert training.state["layers"][0].time.dtype == torch.int64


def test_accumulated_blocks_give_the_gradient_of_their_mean(folder, text):
    """One update over two blocks of sgd is the mean of what each block alone would give."""
    sgd = ["optimiser._target_=torch.optim.SGD", "optimiser.lr=1.0", "schedule.warmup=0", "train.clip=null"]
    config = tiny(*sgd, "train.accumulate=2", "run.precision=float64", task="text", text=text)
    together, apart = Training(config, folder), Training(config, folder)
    before = [parameter.detach().clone() for parameter in together.model.parameters()]
    step(together)
    apart.config.train.accumulate = 1
    moves = []
    for _ in range(2):
        step(apart)
        moves.append([p.detach() - b for p, b in zip(apart.model.parameters(), before, strict=True)])
        with torch.no_grad():
            for parameter, old in zip(apart.model.parameters(), before, strict=True):
                parameter.copy_(old)
    for parameter, old, one, two in zip(together.model.parameters(), before, *moves, strict=True):
        assert torch.allclose(parameter - old, (one + two) / 2, atol=1e-12)


def test_blocks_in_which_nothing_is_asked_cost_no_update(folder):
    training = Training(tiny("task.first_distance=64"), folder)
    step(training)
    assert training.update == 1
    assert training.blocks == 4
    assert training.state["now"].item() == 64


def test_evaluation_in_other_batches_gives_the_same_figures_on_aligned_episodes(folder):
    training = Training(tiny("run.precision=float64"), folder)
    figures = []
    for batch in (4, 8):
        training.config.evaluation.batch, training.config.evaluation.blocks = batch, None
        figures.append(evaluate(training.model, training.task, "test", training.config, training.device))
    assert figures[0]["test/loss"] == pytest.approx(figures[1]["test/loss"], rel=1e-12)
    assert figures[0]["test/accuracy"] == figures[1]["test/accuracy"]
    assert figures[0]["test/memory/size"] == pytest.approx(figures[1]["test/memory/size"], rel=1e-6)


def test_text_is_scored_in_bits_per_byte(folder, text):
    figures = train(tiny("train.updates=2", "evaluation.blocks=null", task="text", text=text), folder)
    assert figures["test/bpb"] == pytest.approx(figures["test/loss"] / math.log(2))


def test_an_evaluation_that_cannot_work_is_refused_before_the_training(folder, text):
    with pytest.raises(ValueError, match="the valid part of task.path=.* has 0 tokens"):
        Training(tiny("evaluation.every=2", "splits=[test]", "task.valid=0", task="text", text=text), folder)


def test_nan_ends_the_run_with_its_update_and_keeps_the_last_good_checkpoint(folder):
    config = tiny("train.updates=20", "run.checkpoint_every=1", "run.log_every=10")
    training = Training(config, folder)
    for _ in range(2):
        step(training)
    training.save()
    with torch.no_grad():
        training.model.output.bias.fill_(math.nan)
    step(training)
    with pytest.raises(ValueError, match="train/loss is nan at update 3"):
        training.save()
    content = checkpoint.load(folder)
    assert content["update"] == 2
    assert all(weight.isfinite().all() for weight in content["model"].values())


def test_a_gradient_that_is_no_number_spoils_no_checkpoint(folder):
    training = Training(tiny("train.updates=20", "run.log_every=10"), folder)
    step(training)
    training.save()
    training.model.output.weight.register_hook(lambda gradient: gradient * math.nan)
    step(training)  # its loss was still a number; its weights are none any more
    with pytest.raises(ValueError, match="train/gradient_norm is nan at update 2"):
        training.save()
    assert checkpoint.load(folder)["update"] == 1


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(folder):
    config = tiny()
    train(config, folder)  # saved at updates 2 and 4
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    training = Training(config, folder)
    assert training.restore()
    assert training.update == 2
    (folder / "checkpoint_previous.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        Training(config, folder).restore()


def test_a_checkpoint_of_another_model_is_refused(folder):
    train(tiny(), folder)
    with pytest.raises(ValueError, match="holds a checkpoint of another model .*memory"):
        train(tiny("model=trans_xl"), folder)


def test_a_full_disk_costs_only_the_checkpoint_being_written(folder):
    """The file size limit stands in for the disk: writing beyond it fails in the same way."""
    config = tiny()
    training = Training(config, folder)
    step(training)
    training.save()
    step(training)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="the checkpoint of update 2 could not be written .* make room"):
            training.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load(folder)["update"] == 1
    assert not list(folder.glob("*.part"))


def test_evaluating_a_run_folder_gives_the_figures_that_training_ended_with(folder, tmp_path):
    overrides = ["task=copy", "memory.max_span=32", *SHRUNK, *TASKS["copy"]]
    trained = command(*overrides, folder=folder)
    assert trained.returncode == 0, trained.stderr
    again = command(f"evaluate={folder}", "splits=[test]", folder=tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (json.loads((each / "summary.json").read_text()) for each in (folder, tmp_path / "again"))
    assert first["figures"]["test/loss"] == second["figures"]["test/loss"]
    named = subprocess.run(
        [sys.executable, "-m", "expire_span", f"evaluate={folder}", "splits=[test]"],
        cwd=tmp_path, check=False, capture_output=True,
    )  # fmt: skip
    assert named.returncode == 0
    assert [path.parent.name[9:] for path in tmp_path.glob("runs/*/*/summary.json")] == ["evaluate-run"]
    farther = command(f"evaluate={folder}", "task.distance=128", "evaluation.blocks=null", folder=tmp_path / "farther")
    assert farther.returncode == 0, farther.stderr
    assert "test/accuracy_distance_64_128" in json.loads((tmp_path / "farther" / "summary.json").read_text())["figures"]


def test_evaluation_knows_the_keys_of_the_run_and_refuses_others(folder, tmp_path, text):
    sizes = ["task=text", f"task.path={text}", "memory.max_span=32", *SHRUNK]
    assert command(*sizes, folder=folder).returncode == 0
    larger = command(f"evaluate={folder}", "task.test=0.2", "splits=[test]", folder=tmp_path / "larger")
    assert larger.returncode == 0, larger.stderr
    assert json.loads((tmp_path / "larger" / "summary.json").read_text())["config"]["task"]["test"] == 0.2
    for wrong, words in (("task.distance=64", "task.distance is not in the config"), ("task=copy", "leave task=copy")):
        refused = command(f"evaluate={folder}", wrong, folder=tmp_path / "refused")
        assert refused.returncode == 1
        assert words in refused.stderr


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(tmp_path):
    overrides = ["-m", "model=trans_xl,expire_span", "seed=1,2", *SHRUNK, *TASKS["copy"], "memory.max_span=32"]
    swept = command(*overrides, f"hydra.sweep.dir={tmp_path}/sweep", folder=tmp_path / "unused")
    assert swept.returncode == 0, swept.stderr
    summaries = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/summary.json"))]
    assert [(each["model"], each["config"]["seed"]) for each in summaries] == [
        ("trans_xl", 1),
        ("trans_xl", 2),
        ("expire_span", 1),
        ("expire_span", 2),
    ]


def test_every_job_of_a_sweep_that_fails_is_told_where_it_fails_and_in_the_report(tmp_path):
    overrides = ["-m", *SHRUNK, *TASKS["copy"], "memory.max_span=32", "train.updates=2", "train.batch=4,0,-1"]
    swept = command(*overrides, f"hydra.sweep.dir={tmp_path}/sweep", folder=tmp_path / "unused")
    assert swept.returncode == 1
    for number, batch in ((1, 0), (2, -1)):
        words = f"job {number} failed: train.batch must be at least 1, got {batch}"
        assert words in swept.stdout
        assert f"failed: train.batch must be at least 1, got {batch}" in table(load_runs([tmp_path / "sweep"]))


def test_a_sweep_does_not_resume(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expire-span", "-m", "resume=somewhere"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit, match="resume=RUN goes on with one run; leave -m away"):
        console.main()


def test_a_killed_run_resumes_from_the_command_line_to_the_same_losses(tmp_path):
    overrides = ["memory.max_span=32", *SHRUNK, *TASKS["copy"], "train.updates=400", "run.log_every=1"]
    folder = tmp_path / "killed"
    arguments = [sys.executable, "-m", "expire_span", *overrides, f"hydra.run.dir={folder}"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(folder / "metrics.jsonl", lines=20)
        process.kill()
    assert not (folder / "summary.json").exists()
    resumed = command(f"resume={folder}", "train.updates=60", folder=folder)
    assert resumed.returncode == 0, resumed.stderr
    straight = command(*overrides, "train.updates=60", folder=tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    ours, theirs = losses(folder), losses(tmp_path / "straight")
    assert len(theirs) == 60
    assert ours == theirs


def test_a_run_with_files_of_ones_own_goes_on_with_them_and_flags_may_be_given(tmp_path):
    (tmp_path / "mine/task").mkdir(parents=True)
    text = (Path(console.__file__).parents[2] / "conf/task/copy.yaml").read_text()
    (tmp_path / "mine/task/mine.yaml").write_text(text)
    overrides = ["task=mine", "memory.max_span=32", *SHRUNK, *TASKS["copy"], "train.updates=2"]
    first = command("--config-dir", str(tmp_path / "mine"), *overrides, folder=tmp_path / "run")
    assert first.returncode == 0, first.stderr
    for given, number in ((["train.updates=3"], 3), (["--config-dir", str(tmp_path / "mine"), "train.updates=4"], 4)):
        resumed = command(f"resume={tmp_path / 'run'}", *given, folder=tmp_path / "run")
        assert resumed.returncode == 0, resumed.stderr
        assert checkpoint.load(tmp_path / "run")["update"] == number


@pytest.mark.parametrize(
    ("change", "words"),
    [("train.updates=1", "has done 2 updates"), ("seed=7", "leave seed=7 away"), ("model=trans_xl", "leave model=")],
)
def test_what_would_contradict_a_run_is_not_gone_on_with(change, words, tmp_path):
    overrides = ["memory.max_span=32", *SHRUNK, *TASKS["copy"], "train.updates=2"]
    assert command(*overrides, folder=tmp_path / "run").returncode == 0
    before = (tmp_path / "run/summary.json").read_text()
    result = command(f"resume={tmp_path / 'run'}", change, folder=tmp_path / "run")
    assert result.returncode == 1
    assert words in result.stderr
    assert (tmp_path / "run/summary.json").read_text() == before


def test_going_on_takes_the_optimisers_settings_of_now(folder):
    train(tiny(), folder)
    training = Training(tiny("train.updates=8", "optimiser.lr=0.5"), folder)
    assert training.restore()
    assert max(group["full_lr"] for group in training.optimiser.param_groups) == 0.5


def test_a_folder_with_signs_in_its_name_can_be_gone_on_with(tmp_path):
    folder, overrides = tmp_path / "lr=1,x", ["memory.max_span=32", *SHRUNK, *TASKS["copy"], "train.updates=2"]
    assert command(*overrides, folder=f"'{folder}'").returncode == 0
    arguments = [sys.executable, "-m", "expire_span", f"resume={folder}", "train.updates=3"]
    subprocess.run(arguments, check=True, capture_output=True, timeout=120)
    assert checkpoint.load(folder)["update"] == 3


def test_results_without_a_checkpoint_are_not_written_over(folder):
    train(tiny(), folder)
    for name in checkpoint.NAMES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="results but no checkpoint"):
        train(tiny(), folder)


def wait_for(path: Path, lines: int) -> None:
    deadline = time.time() + 60
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert time.time() < deadline, f"{path} has not {lines} lines after a minute"
        time.sleep(0.05)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    overrides = ["memory.max_span=32", *SHRUNK, *TASKS["copy"], "train.updates=100000", "run.checkpoint_every=100000"]
    arguments = [sys.executable, "-m", "expire_span", *overrides, f"hydra.run.dir={folder}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(folder / "metrics.jsonl", lines=2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(rf"^stopped at update \d+; to go on: expire-span resume={folder}$", errors, re.MULTILINE), errors
    assert checkpoint.load(folder)["update"] > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["modle=trans_xl"], "modle"),
        (["train.updates=many"], "train.updates: Value 'many'"),
        (["task=text", "task.path=nowhere.txt"], "task.path=nowhere.txt does not exist"),
        (["evaluate=nowhere"], "nowhere is not a run folder"),
        (["resume=nowhere"], "nowhere is not a run folder"),
        (["run.device=tpu"], "run.device=tpu is not on this machine"),
        (["model=compressive", "model.max_span=8"], "model.max_span=8 is too short for blocks of 32"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_the_value(overrides, words, tmp_path):
    result = command(*overrides, "wandb.mode=disabled", folder=tmp_path / "run", cwd=tmp_path)
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_run_folder_in_use_is_refused(folder):
    from expire_span.runner.record import lock

    with lock(folder):
        result = command("wandb.mode=disabled", folder=folder)
    assert result.returncode == 1
    assert f"in use by process {os.getpid()}" in result.stderr
