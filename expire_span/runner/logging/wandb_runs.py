"""Summaries of runs that were made elsewhere, from W&B."""

from collections.abc import Mapping
from pathlib import Path


def fetch_summaries(project: str, wanted: Mapping[tuple[str, int], Path]) -> int:
    """Download the summary.json of finished runs, each into a run folder of its own, and return how many there were.

    Of several runs with the same group and seed, the latest that has one is taken.

    Args:
        project: ENTITY/PROJECT.
        wanted: the folder for each group and seed.

    Raises:
        ValueError: if W&B cannot be asked.
    """
    import wandb
    from wandb.errors import Error

    num_fetched = 0
    try:
        api = wandb.Api()
        for group in dict.fromkeys(group for group, _ in wanted):
            folders = {seed: folder for (name, seed), folder in wanted.items() if name == group}
            for run in api.runs(project, filters={"group": group, "state": "finished"}, order="-created_at"):
                folder = folders.get(run.config.get("seed"))
                files = [file for file in run.files(["summary.json"]) if file.name == "summary.json"]
                if folder is not None and files:
                    folder.mkdir(parents=True, exist_ok=True)
                    files[0].download(root=str(folder), replace=True).close()
                    del folders[run.config["seed"]]
                    num_fetched += 1
    except (Error, OSError, ValueError) as error:  # no account, no such project, no network
        reason = str(error).partition("\n")[0]
        raise ValueError(f"W&B does not give the runs of {project}: {reason}") from error
    return num_fetched
