"""W&B mirrors a run, and no run depends on it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked_command import forked_command
from tiny_config import COPY, compose_config, tiny_config
from wandb_file import wandb_records, wandb_rows

from expire_span.runner.config.schema import validate
from expire_span.runner.logging.trackers import trackers
from expire_span.runner.logging.wandb_logger import default_group
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train
from expire_span.runner.trainer import build_task
from expire_span.tasks.base import LOWER_IS_BETTER

CONF = Path(__file__).parents[2] / "conf"


def written_files():
    """The .wandb files of the offline runs in the current folder, complete."""
    sys.modules["wandb"].teardown()  # otherwise W&B goes on writing, and stays in this folder
    return set(Path("wandb").absolute().glob("offline-run-*/run-*.wandb"))


def numbers(rows):
    """Rows of metrics, without what is shown beside them."""
    rows = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]
    return [row for row in rows if len(row) > 1]


class FakeRun:
    """A run of W&B online, which remembers what an earlier start has sent."""

    def __init__(self, **summary):
        self.summary, self.rows = summary, []

    def define_metric(self, name, step_metric, summary=None):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        pass


def test_an_offline_run_is_kept_for_a_later_sync_under_its_own_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    names = ["wandb.group=together", "wandb.tags=[a,b]"]
    train(tiny_config("wandb.mode=offline", "wandb.log_model=best", "eval.interval=2", *names), folder)
    [path] = written_files()
    content = path.read_bytes()
    [run] = [record.run for record in wandb_records(path) if record.HasField("run")]
    assert (run.run_group, run.job_type, list(run.tags)) == ("together", "ExpireSpan", ["a", "b"])
    for text in (b"together", b"train/accuracy", b"memory/size_layer_1", b"expire_span.tasks.copy.Copy"):
        assert text in content
    rows = wandb_rows(path)
    assert [row["update"] for row in rows if "spans/layer_1" in row] == [2, 4]
    kinds = {name: rows[-1][name]["_type"] for name in ("test/spans", "test/accuracy_by_distance")}
    assert kinds == {"test/spans": "image-file", "test/accuracy_by_distance": "table-file"}
    assert json.loads((path.parent / "files/summary.json").read_text())["finished"]  # for expire-span-paper
    [model] = [record.artifact for record in wandb_records(path) if record.artifact.type == "model"]
    assert set(model.aliases) == {"best", "latest"}
    assert {file.path for file in model.manifest.contents} == {"best.safetensors", "summary.json", "vocab.json"}


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 0.9), ("error", 0.1)])
def test_the_summary_has_the_best_value_beside_the_last_one_which_stays_a_number(metric, best, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = f"valid/{metric}"
    with trackers(tiny_config("wandb.mode=offline"), tmp_path, "id123456", metric) as log_row:
        for update, value in enumerate((0.1, 0.9, 0.5)):
            log_row({"update": update, key: value})
        summary = sys.modules["wandb"].run.summary
        assert (summary[key], summary[f"{key}_best"]) == (0.5, best)
    [path] = written_files()
    stored = {}
    for record in wandb_records(path):
        stored |= {item.key or tuple(item.nested_key): json.loads(item.value_json) for item in record.summary.update}
    assert stored[f"{key}_best"] == best


def test_weights_that_are_a_link_are_not_uploaded(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("of the user")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "secret")
    config = tiny_config("wandb.mode=offline", "wandb.log_model=last")
    with trackers(config, tmp_path, "id123456", "accuracy"):
        pass
    assert "model.safetensors is a link" in caplog.text
    assert not [record for path in written_files() for record in wandb_records(path) if record.HasField("artifact")]


def test_the_group_of_a_run_of_before_memory_budget_stays_the_same():
    earlier = tiny_config()
    del earlier.memory["budget"]
    assert default_group(tiny_config()) == default_group(earlier) != default_group(tiny_config("memory.budget=40"))


def test_after_a_kill_wandb_gets_every_row_that_it_lacks(tmp_path, monkeypatch):
    import wandb

    train(tiny_config("train.updates=6"), tmp_path)  # killed, when W&B had the rows up to update 4
    monkeypatch.setattr(wandb, "init", lambda **keywords: run)
    run = FakeRun(update=4)
    train(tiny_config("wandb.mode=online", "train.updates=8"), tmp_path)
    assert numbers(run.rows) == [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["update"] >= 4]


def test_an_offline_run_that_goes_on_writes_all_rows_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny_config("wandb.mode=offline"), tmp_path)
    first = written_files()
    train(tiny_config("wandb.mode=offline", "train.updates=6"), tmp_path)
    [path] = written_files() - first
    assert numbers(wandb_rows(path)) == read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(("ending", "preempted"), [(SystemExit, True), (ValueError, False)])
def test_a_stopped_run_is_preempted_and_one_with_an_error_has_failed(ending, preempted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ending), trackers(tiny_config("wandb.mode=offline"), tmp_path, "id123456", "accuracy"):
        raise ending
    [path] = written_files()
    records = list(wandb_records(path))
    assert any(record.HasField("preempting") for record in records) == preempted
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"wandb.tags=[{'x' * 65}]", "wandb.tags may have 1 to 64 characters each, got 65: 'xxx"),
        ("wandb.tags=['']", "wandb.tags may have 1 to 64 characters each, got 0: ''"),
        (f"wandb.group={'x' * 129}", "wandb.group must have 1 to 128 characters, got 129"),
        ("wandb.project=my/project", "wandb.project must not contain any of"),
        ("wandb.log_model=true", "wandb.log_model must be one of false, last, best, got true"),
        ("wandb.log_model=best", "wandb.log_model=best needs eval.interval=N"),
    ],
)
def test_a_name_that_wandb_would_refuse_is_refused_before_the_run_begins(override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(override)


def test_names_that_are_numbers_are_names():
    config = tiny_config("wandb.project=2025", "wandb.tags=[2025]", "wandb.group=1")
    assert (config.wandb.project, list(config.wandb.tags), config.wandb.group) == ("2025", ["2025"], "1")


def test_the_variable_wandb_mode_decides_where_the_config_says_auto(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(tiny_config("wandb.mode=auto"), tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_seeds_share_a_group_and_other_settings_do_not():
    group = default_group(tiny_config())
    assert group.startswith("Copy-ExpireSpan-")
    assert group == default_group(tiny_config("seed=2", "run.log_every=1", "wandb.tags=[a]", "tracker=none"))
    assert group == default_group(tiny_config("train.micro_batch_size=auto"))
    for other in ("memory.alpha=0.5", "task.episode_length=32", "train.updates=8", "model=trans_xl"):
        assert default_group(tiny_config(other)) != group


@pytest.mark.slow
def test_an_evaluation_of_an_uploaded_model_is_a_run_of_its_own_that_names_the_trained_one(tmp_path):
    offline = {"WANDB_MODE": "offline"}
    train = ["expire-span", *COPY, "wandb.mode=auto", "wandb.log_model=last", f"hydra.run.dir={tmp_path}/trained"]
    longer = ["task.episode_length=128", "eval.splits=[test]", f"hydra.run.dir={tmp_path}/longer"]
    evaluate = ["expire-span", f"evaluate={tmp_path}/downloaded", *longer]
    runs = []
    for number, command in enumerate((train, evaluate)):
        (tmp_path / str(number)).mkdir()
        ended = forked_command(command, tmp_path / str(number), environment=offline)
        assert ended.code == 0, ended.stderr
        [path] = (tmp_path / str(number)).glob("wandb/offline-run-*/run-*.wandb")
        [run] = [record.run for record in wandb_records(path) if record.HasField("run")]
        for record in wandb_records(path):
            for file in record.artifact.manifest.contents if record.artifact.type == "model" else ():
                target = tmp_path / "downloaded" / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "trained" / file.path, target)
        runs.append((run, {item.key: item.value_json for item in run.config.update}, wandb_rows(path)))
    (trained, _, _), (evaluation, config, rows) = runs
    assert evaluation.job_type == "evaluation"
    assert evaluation.run_group == trained.run_group
    assert evaluation.run_id != trained.run_id
    assert config["trained_run"] == f'"{trained.run_id}"'
    assert numbers(rows) == read_metrics(tmp_path / "longer" / "metrics.jsonl")


@pytest.mark.slow
def test_a_run_of_a_sweep_has_its_tag_also_when_it_is_resumed(tmp_path):
    start = [sys.executable, "-m", "expire_span"]
    sweep_folder = [f"hydra.sweep.dir={tmp_path}/together", "hydra.sweep.subdir=one"]
    sweep = [*start, "-m", *COPY, "train.updates=2", "wandb.mode=offline", *sweep_folder]
    resume = [*start, f"resume={tmp_path}/together/one", "train.updates=3"]
    for number, command in enumerate((sweep, resume), start=1):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        paths = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(paths) == number
        assert all(b"together" in path.read_bytes() for path in paths)


@pytest.mark.parametrize("path", sorted((CONF / "wandb_sweeps").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("end", [0, -1], ids=["first point", "last point"])
def test_the_points_of_a_wandb_sweep_are_commands_of_ours(path, end):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["command"] == ["${env}", "expire-span", "${args_no_hyphens}"]
    points = {  # the ends of each parameter, as wandb agent writes them
        key: parameter.get("values", [parameter.get("value", parameter.get("min")), parameter.get("max")])
        for key, parameter in sweep["parameters"].items()
    }
    overrides = [f"{key}={values[0] if values[end] is None else values[end]}" for key, values in points.items()]
    config = validate(compose_config(*overrides))
    assert config.wandb.mode == "online"
    split, metric = sweep["metric"]["name"].split("/")
    assert split in config.eval.splits
    assert metric == build_task(config).metric
    assert (sweep["metric"]["goal"] == "minimize") == (metric in LOWER_IS_BETTER)


def test_a_bayesian_sweep_optimizes_what_the_run_reports_at_its_end(tmp_path):
    """W&B's search takes the best value of the metric that a run has logged: there must be one, also for a task or
    size that evaluates on the way.
    """
    sweep = yaml.safe_load((CONF / "wandb_sweeps/rate_and_alpha.yaml").read_text())
    values = {key: parameter.get("value", parameter.get("min")) for key, parameter in sweep["parameters"].items()}
    overrides = [f"{key}={value}" for key, value in values.items()]
    config = validate(compose_config(*COPY, "eval.interval=2", *overrides, "tracker=none"))
    metrics = train(config, tmp_path)
    name = sweep["metric"]["name"]
    assert [row[name] for row in read_metrics(tmp_path / "metrics.jsonl") if name in row] == [metrics[name]]


def test_a_run_without_the_package_continues_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = train(tiny_config("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in metrics
    assert "W&B is off for this run" in caplog.text


def test_a_run_whose_wandb_fails_in_the_middle_continues(tmp_path, monkeypatch, caplog):
    import wandb

    class FailingRun(FakeRun):
        def log(self, row):
            raise OSError("no space left")

        def finish(self, exit_code):
            raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", lambda **keywords: FailingRun())
    metrics = train(tiny_config("wandb.mode=online"), tmp_path)
    assert "test/accuracy" in metrics
    assert caplog.text.count("W&B stopped") == 1
