"""Weights & Biases mirrors metrics.jsonl. See trackers.py for what isolates a run from its failures."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from expire_span.tasks.base import LOWER_IS_BETTER

from ..run_folder import weights
from ..run_folder.summary import NO_SETTINGS
from .media import Media, Table

log = logging.getLogger(__name__)

MAX_NAME_LENGTH, MAX_TAG_LENGTH = 128, 64  # W&B's own limits, in characters


def check_wandb(config: DictConfig) -> None:
    """Raises ValueError for a name that W&B would refuse when the run has begun, or weights that will not exist."""
    settings = config.wandb
    for key in ("project", "entity", "group"):
        name = settings[key]
        if name is not None and not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise ValueError(f"wandb.{key} must have 1 to {MAX_NAME_LENGTH} characters, got {len(name)}: {name!r}")
    if set(settings.project) & set("/\\#?%:"):
        raise ValueError(f"wandb.project must not contain any of / \\ # ? % :, got {settings.project!r}")
    for tag in settings.tags:
        if not 1 <= len(tag) <= MAX_TAG_LENGTH:
            raise ValueError(f"wandb.tags may have 1 to {MAX_TAG_LENGTH} characters each, got {len(tag)}: {tag!r}")
    if settings.log_model not in (False, *weights.FILES):
        raise ValueError(f"wandb.log_model must be one of false, last, best, got {str(settings.log_model).lower()}")
    if settings.log_model == "best" and config.eval.interval is None:
        raise ValueError("wandb.log_model=best needs eval.interval=N: the best weights are those of an evaluation")


def default_group(config: DictConfig) -> str:
    """A name for the runs that differ in nothing but the seed, over which W&B averages those of one group."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    for key in (*NO_SETTINGS, "seed", "run", "evaluate", "resume"):
        plain.pop(key, None)
    plain["train"]["micro_batch_size"] = None  # changes no result, and auto is another number on each machine
    if plain["memory"].get("budget") is None:  # as in runs of before this key was added, which stay in their group
        plain["memory"].pop("budget", None)
    plain["task"].pop("seed", None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return f"{class_name(config.task)}-{class_name(config.model)}-{digest[:8]}"


def class_name(section: DictConfig) -> str:
    """The class that a section of the config builds, without its module."""
    return str(section._target_).rpartition(".")[2]


@contextmanager
def wandb_logger(
    config: DictConfig,
    folder: Path,
    run_id: str,
    metric: str,
    earlier_rows: Iterable[Mapping[str, float]] = (),
    job_type: str | None = None,
    trained_run: str | None = None,
) -> Iterator[Callable[[Mapping[str, float], Media], None]]:
    """Yield a function that logs one row of metrics, with the media beside it.

    Args:
        config: of the run.
        folder: of the run; its name is the display name of the W&B run.
        run_id: W&B's id of the run, so that a resumed run continues the same one.
        metric: of the task; W&B's summary has its best value on the validation split (`_best`) beside the last one.
        earlier_rows: what a resumed run has logged before; W&B gets those rows that it lacks.
        job_type: of a run that does not train (None: the model).
        trained_run: id of the run whose model this one uses, if it does not train.
    """
    run = init_run(config, folder.name, run_id, job_type, trained_run)
    try:
        run.define_metric("*", step_metric="update")  # the axis of every plot
        better = min if metric in LOWER_IS_BETTER else max
        best: dict[str, float] = {}
        known_update = run.summary.get("update", -math.inf)  # the last one of which W&B has a row

        def log_row(row: Mapping[str, float], media: Media) -> None:
            for key in row.keys() & {f"valid/{metric}", f"valid/rl/{metric}"}:
                # Not by define_metric(summary=...), which puts a dictionary in the place of the last value: a sweep
                # could neither sort by it nor optimize it.
                best[key] = better(best.get(key, row[key]), row[key])
                run.summary[f"{key}_best"] = best[key]
            if row["update"] >= known_update:
                # Without W&B's step, which may not go back to the checkpoint after a kill.
                run.log({**row, **{name: to_wandb(item) for name, item in media.items()}})

        for row in earlier_rows:
            log_row(row, {})
        yield log_row
    except BaseException as error:
        if isinstance(error, SystemExit):  # stopped by a signal: it may go on, and has not failed
            run.mark_preempting()
        run.finish(exit_code=1)
        raise
    try:
        if job_type is None:
            if (folder / "summary.json").is_file() and not (folder / "summary.json").is_symlink():
                copy = shutil.copy(folder / "summary.json", run.dir)  # of a file elsewhere W&B makes a link, and warns
                run.save(copy, base_path=run.dir, policy="now")  # for `fetch_summaries`
            upload_model(run, config, folder)
    except Exception as error:
        log.warning("W&B did not get the summary or the model (%s); they are in %s", error, folder)
    run.finish(exit_code=0)


def to_wandb(item: Tensor | np.ndarray | Table) -> Any:
    """A histogram, image or table as W&B has it."""
    import wandb

    if isinstance(item, Table):
        return wandb.Table(columns=list(item.columns), data=[list(row) for row in item.rows])
    return wandb.Histogram(item.tolist()) if isinstance(item, Tensor) else wandb.Image(item)


def upload_model(run: Any, config: DictConfig, folder: Path) -> None:
    """Log the weights that `wandb.log_model` names as an artifact, which is a run folder that evaluate=RUN takes."""
    if not (which := config.wandb.log_model):
        return
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model")
    if (folder / weights.FILES[which]).is_symlink():  # a link could name any file of the user
        raise ValueError(f"{weights.FILES[which]} is a link")
    artifact.add_file(str(folder / weights.FILES[which]))
    for name in (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "summary.json", "vocab.json"):
        if (folder / name).is_file() and not (folder / name).is_symlink():
            artifact.add_file(str(folder / name), name=name)
    run.log_artifact(artifact, aliases=[which])


def init_run(
    config: DictConfig, name: str, run_id: str, job_type: str | None = None, trained_run: str | None = None
) -> Any:
    """Start or resume the W&B run with this name and id."""
    import wandb  # takes a second to import, and may be missing on a machine without a network

    settings, plain = config.wandb, cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    del plain["wandb"]  # where, and by whom, W&B knows itself
    init = partial(
        wandb.init,
        project=settings.project,
        entity=settings.entity,
        group=settings.group or default_group(config),
        job_type=job_type or class_name(config.model),
        tags=list(settings.tags),
        name=name[:MAX_NAME_LENGTH],
        id=run_id,
        resume="allow",
        config=plain | ({"trained_run": trained_run} if job_type else {}),
        settings=wandb.Settings(silent=True),
    )
    if settings.mode != "auto":
        return init(mode=settings.mode)
    if "WANDB_MODE" in os.environ:
        return init()  # follows the variable
    try:
        if wandb.login(prompt=False):
            return init(mode="online")
    except Exception as error:
        log.warning("W&B cannot be reached (%s); the run is logged offline, for `wandb sync`", error)
    return init(mode="offline")
