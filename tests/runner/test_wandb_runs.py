"""Runs that were made elsewhere come from W&B as their summaries."""

import json
from types import SimpleNamespace

import pytest
import wandb
from forked_command import forked_command

from expire_span.runner.logging.wandb_runs import fetch_summaries


class File:
    """A file of a W&B run, as its API has them."""

    def __init__(self, name, content):
        self.name, self.content = name, content

    def download(self, root, replace):
        path = f"{root}/{self.name}"
        with open(path, "w") as file:
            file.write(self.content)
        return open(path)


def run(seed, *files):
    return SimpleNamespace(config={"seed": seed}, files=lambda names: [file for file in files if file.name in names])


def summary(value):
    return File("summary.json", json.dumps({"finished": True, "value": value}))


@pytest.fixture
def questions(monkeypatch):
    """What W&B is asked for; it has runs of one group: two of seed 1, of which the later has no summary, and seed 2."""
    asked = []
    runs = {"mini/table1": [run(1), run(1, summary("later")), run(1, summary("earlier")), run(2, summary("two"))]}

    class Api:
        def runs(self, project, filters, order):
            asked.append((project, filters, order))
            return runs.get(filters["group"], [])

    monkeypatch.setattr(wandb, "Api", Api)
    return asked


def test_the_latest_finished_run_of_each_group_and_seed_that_is_wanted_is_taken(tmp_path, questions):
    wanted = {("mini/table1", 1): tmp_path / "a", ("mini/table1", 3): tmp_path / "b", ("mini/none", 1): tmp_path / "c"}
    assert fetch_summaries("team/project", wanted) == 1
    assert json.loads((tmp_path / "a/summary.json").read_text())["value"] == "later"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    filters = [{"group": group, "state": "finished"} for group in ("mini/table1", "mini/none")]
    assert questions == [("team/project", group, "-created_at") for group in filters]


def test_without_an_account_the_command_says_so_in_one_line(tmp_path):
    command = ["expire-span-paper", "table1", "--from-wandb=team/project", "--no-launch"]
    environment = {"WANDB_API_KEY": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    ended = forked_command(command, tmp_path, environment=environment)
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "W&B does not give the runs of team/project: " in ended.stderr
