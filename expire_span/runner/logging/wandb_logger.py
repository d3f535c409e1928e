"""Weights & Biases mirrors metrics.jsonl. A run never depends on it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

LogRow = Callable[[dict[str, float]], None]


@contextmanager
def wandb_logger(config: DictConfig, name: str, run_id: str) -> Iterator[LogRow]:
    """Yield a function that logs one row of metrics. Any failure is reported once, and the run continues without W&B.

    Args:
        name: display name of the W&B run.
        run_id: W&B's id of the run, so that a resumed run continues the same one.
    """
    run = None
    if config.wandb.mode != "disabled":
        try:
            run = init_run(config, name, run_id)
        except Exception as error:  # no package, no network, no disk space: none of them may stop the run
            log.warning("W&B is off for this run (%s); metrics.jsonl has everything", error)

    def log_row(row: dict[str, float]) -> None:
        nonlocal run
        if run is not None:
            try:
                run.log(row, step=int(row["update"]))
            except Exception as error:
                log.warning("W&B stopped (%s); metrics.jsonl goes on", error)
                run = None

    try:
        yield log_row
    except BaseException:
        finish_run(run, exit_code=1)
        raise
    finish_run(run, exit_code=0)


def init_run(config: DictConfig, name: str, run_id: str) -> Any:
    """Start or resume the W&B run with this name and id."""
    import wandb  # takes a second to import, and may be missing on a machine without a network

    settings = config.wandb
    init = partial(
        wandb.init,
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=list(settings.tags),
        name=name,
        id=run_id,
        resume="allow",
        config=cast(dict[str, Any], OmegaConf.to_container(config)),
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


def finish_run(run: Any, exit_code: int) -> None:
    """Finish a W&B run, if there is one; 0 marks it as successful."""
    if run is not None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("W&B did not finish (%s); metrics.jsonl has everything", error)
