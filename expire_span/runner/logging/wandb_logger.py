"""Weights & Biases mirrors metrics.jsonl. A run never depends on it."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from expire_span.tasks.base import LOWER_IS_BETTER

log = logging.getLogger(__name__)

LogRow = Callable[[Mapping[str, float]], None]
MAX_NAME_LENGTH, MAX_TAG_LENGTH = 128, 64  # W&B's own limits, in characters


def check_wandb(settings: DictConfig) -> None:
    """Raises ValueError for a name that W&B would refuse when the run has begun."""
    for key in ("project", "entity", "group"):
        name = settings[key]
        if name is not None and not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise ValueError(f"wandb.{key} must have 1 to {MAX_NAME_LENGTH} characters, got {len(name)}: {name!r}")
    if set(settings.project) & set("/\\#?%:"):
        raise ValueError(f"wandb.project must not contain any of / \\ # ? % :, got {settings.project!r}")
    for tag in settings.tags:
        if not 1 <= len(tag) <= MAX_TAG_LENGTH:
            raise ValueError(f"wandb.tags may have 1 to {MAX_TAG_LENGTH} characters each, got {len(tag)}: {tag!r}")


def default_group(config: DictConfig) -> str:
    """A name for the runs that differ in nothing but the seed, over which W&B averages those of one group."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    for key in ("seed", "run", "wandb", "evaluate", "resume", "paper", "simplified"):  # no settings of the training
        plain.pop(key, None)
    plain["task"].pop("seed", None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return f"{class_name(config.task)}-{class_name(config.model)}-{digest[:8]}"


def class_name(section: DictConfig) -> str:
    """The class that a section of the config builds, without its module."""
    return str(section._target_).rpartition(".")[2]


@contextmanager
def wandb_logger(
    config: DictConfig,
    name: str,
    run_id: str,
    metric: str,
    earlier_rows: Iterable[Mapping[str, float]] = (),
) -> Iterator[LogRow]:
    """Yield a function that logs one row of metrics. Any failure is reported once, and the run continues without W&B.

    Args:
        name: display name of the W&B run.
        run_id: W&B's id of the run, so that a resumed run continues the same one.
        metric: of the task; W&B's summary shows the best value of each split beside the last one.
        earlier_rows: what a resumed run has logged before; W&B gets those rows that it lacks.
    """
    run, known_update = None, -math.inf  # the last update of which W&B has a row
    if config.wandb.mode != "disabled":
        try:
            run = init_run(config, name, run_id)
            run.define_metric("*", step_metric="update")  # the axis of every plot
            best = "min" if metric in LOWER_IS_BETTER else "max"
            for key in (f"valid/{metric}", f"test/{metric}", f"valid/rl/{metric}", f"test/rl/{metric}"):
                run.define_metric(key, step_metric="update", summary=f"{best},last")
            known_update = run.summary.get("update", -math.inf)
        except Exception as error:  # no package, no network, no disk space: none of them may stop the run
            log.warning("W&B is off for this run (%s); metrics.jsonl has everything", error)

    def log_row(row: Mapping[str, float]) -> None:
        nonlocal run
        if run is not None and row["update"] >= known_update:
            try:
                run.log(dict(row))  # without W&B's step, which may not go back to the checkpoint after a kill
            except Exception as error:
                log.warning("W&B stopped (%s); metrics.jsonl goes on", error)
                run = None

    for row in earlier_rows:
        log_row(row)
    try:
        yield log_row
    except BaseException as error:
        finish_run(run, exit_code=1, stopped=isinstance(error, SystemExit))
        raise
    finish_run(run, exit_code=0)


def init_run(config: DictConfig, name: str, run_id: str) -> Any:
    """Start or resume the W&B run with this name and id."""
    import wandb  # takes a second to import, and may be missing on a machine without a network

    settings, plain = config.wandb, cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    init = partial(
        wandb.init,
        project=settings.project,
        entity=settings.entity,
        group=settings.group or default_group(config),
        job_type=class_name(config.model),
        tags=list(settings.tags),
        name=name[:MAX_NAME_LENGTH],
        id=run_id,
        resume="allow",
        config={key: value for key, value in plain.items() if key != "wandb"},  # where, and by whom, W&B knows itself
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


def finish_run(run: Any, exit_code: int, stopped: bool = False) -> None:
    """Finish a W&B run, if there is one; 0 marks it as successful. A stopped one, which may go on, has not failed."""
    if run is not None:
        try:
            if stopped:
                run.mark_preempting()
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("W&B did not finish (%s); metrics.jsonl has everything", error)
