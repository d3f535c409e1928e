"""The dashboard shows metrics that exist, by model and group, and is made without a network."""

import json
import re
import sys
from pathlib import Path

import pytest

from expire_span.runner.commands import dashboard

METRICS_PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def printed(capsys, *arguments):
    dashboard.main(["--entity", "team", "--json", *arguments])
    return json.loads(capsys.readouterr().out)


def panels(view):
    return [panel for section in view["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def test_runs_are_grouped_by_model_and_then_by_group_in_the_colors_of_the_models(capsys):
    section = printed(capsys)["spec"]["section"]
    [runs] = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["jobType", "group"]
    colored = {
        re.search("value%22%3A%22([A-Za-z]+)", key)[1]: color for key, color in section["customRunColors"].items()
    }
    assert colored == dashboard.COLORS
    assert section["settings"]["xAxis"] == "update"


def test_quality_is_plotted_against_updates_and_memories_held(capsys):
    view = printed(capsys, "--metric", "bpb", "--project", "books")
    assert (view["entity"], view["project"]) == ("team", "books")
    [scatter] = [panel["config"] for panel in panels(view) if panel["viewType"] == "Scatter Plot"]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:test/memory/held", "summary:test/bpb")
    lines = [panel["config"] for panel in panels(view) if panel["viewType"] == "Run History Line Plot"]
    axes = [(line["xAxis"], line["metrics"]) for line in lines]
    assert axes[:2] == [("update", ["valid/bpb", "test/bpb"]), ("valid/memory/held", ["valid/bpb"])]
    for name in (name for _, names in axes for name in names):
        assert f"`{name.removeprefix('valid/').removeprefix('test/')}`" in METRICS_PAGE


def test_the_table_and_the_picture_are_those_that_runs_log(capsys):
    view = panels(printed(capsys, "--metric", "error"))
    assert [panel["config"]["mediaKeys"] for panel in view if panel["viewType"] == "Media Browser"] == [["test/spans"]]
    assert '"val": "test/error_by_distance"' in json.dumps([panel for panel in view if panel["viewType"] == "Weave"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "acuracy"], "--metric acuracy is no task's metric; did you mean accuracy?"),
        (["--metric", "f1"], "--metric f1 is no task's metric; there are bpb, bpc"),
        ([], "W&B did not save the dashboard .*; --json prints what would be saved"),
    ],
)
def test_a_metric_that_does_not_exist_and_a_missing_account_are_one_line(arguments, message, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", "/nonexistent")
    with pytest.raises(SystemExit, match=message):
        dashboard.main(["--entity", "team", *arguments])


def test_without_its_package_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(SystemExit, match=r"needs wandb-workspaces: pip install 'expire-span\[dashboard\]'"):
        dashboard.main(["--entity", "team", "--json"])
