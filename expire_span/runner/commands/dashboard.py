"""Save a view of a W&B project with the plots that the models are compared by: `expire-span-dashboard`."""

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any

from expire_span.tasks.base import METRICS

from ..errors import exit_with_message, one_line
from ..logging.answer_metrics import ACCURACY_METRICS

COLORS: dict[object, object] = {
    "ExpireSpan": "#d1495b",
    "TransXL": "#8d99ae",
    "AdaptiveSpan": "#edae49",
    "Compressive": "#2b6777",
}
RL_METRICS = ("rl/success", "rl/episode_return")


def workspace(entity: str, project: str, metric: str = "accuracy", name: str = "Expire-Span") -> Any:
    """The view, a Workspace of the package wandb-workspaces, which asks for no network and no account.

    Runs are grouped by model, each in its color, and within a model by group, so that plots are means over seeds.

    Args:
        entity, project: whose runs it shows.
        metric: of the tasks in the project, without the split: accuracy, bpb, rl/success ...
        name: of the view.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.expr import Metric

    def plot(title: str, *metrics: str, x: str = "update") -> Any:
        return reports.LinePlot(title=title, x=x, y=list(metrics), title_x=x)

    table = f"test/{metric}_by_distance"
    held, last = reports.SummaryMetric("test/memory/held"), reports.SummaryMetric(f"test/{metric}")
    sections: dict[str, list[Any]] = {
        f"Quality: {metric}": [
            plot("by update", f"valid/{metric}", f"test/{metric}"),
            reports.ScatterPlot(title="at the end, by memories held", x=held, y=last),
            plot("in training, by memories held", f"valid/{metric}", x="valid/memory/held"),
        ],
        "Memory": [
            plot("memories held", "memory/held"),
            plot("memories that a query sees", "memory/size"),
            plot("mean span of a new memory, timesteps", "memory/span"),
        ],
        "Cost": [
            plot("ms per training step", "perf/ms_per_batch"),
            plot("peak memory, GB (CUDA)", "perf/peak_memory_gb"),
            plot("peak memory of the process, GB (CPU)", "perf/peak_resident_gb"),
        ],
        "Test split": [
            *([reports.WeavePanelSummaryTable(table_name=table)] if metric in ACCURACY_METRICS else []),
            reports.MediaBrowser(title="spans", media_keys=["test/spans"]),
        ],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[workspaces.Section(name=title, panels=sections[title], is_open=True) for title in sections],
        settings=workspaces.WorkspaceSettings(x_axis="update"),
        runset_settings=workspaces.RunsetSettings(groupby=[Metric("JobType"), Metric("Group")], group_colors=COLORS),
    )


def check_metric(metric: str) -> None:
    """Raises ValueError for what no task has. Environments of the user's own may have any rl/..."""
    if metric not in METRICS and not metric.startswith("rl/"):
        known = (*METRICS, *RL_METRICS)
        close = difflib.get_close_matches(metric, known, 1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"--metric {metric} is no task's metric; {advice}")


def save(view: Any) -> str:
    """Save the view, and return its address. Raises ValueError without an account or a network."""
    try:
        return str(view.save().url)
    except Exception as error:  # of several packages
        reason = one_line(error)
        raise ValueError(f"W&B did not save the dashboard ({reason}); --json prints what would be saved") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-dashboard",
        description="Save a view of a W&B project: quality by update and by memories held, memory, time, accuracy by "
        "distance and spans; runs grouped by model and by group, so that plots are means over seeds.",
    )
    add = parser.add_argument
    add("--entity", required=True, help="the user or team that has the project")
    add("--project", default="expire-span", help="default: expire-span")
    add("--metric", default="accuracy", help="of the task, as accuracy, error, bpb or rl/success (default: accuracy)")
    add("--name", default="Expire-Span", help="of the view (default: Expire-Span)")
    add("--json", action="store_true", help="print the view instead of saving it; needs no account")
    options = parser.parse_args(arguments)
    try:
        check_metric(options.metric)
        try:
            view = workspace(options.entity, options.project, options.metric, options.name)
        except ImportError:
            raise ValueError(
                "expire-span-dashboard needs wandb-workspaces: pip install 'expire-span[dashboard]'"
            ) from None
        if options.json:
            print(json.dumps(view._to_model().model_dump(by_alias=True, mode="json"), indent=2))
        else:
            print(save(view))
    except Exception as error:
        exit_with_message(error)


if __name__ == "__main__":
    main()
