"""Weights & Biases shows what metrics.jsonl holds. A run never depends on it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

Mirror = Callable[[dict[str, float]], None]


@contextmanager
def mirror(config: DictConfig, name: str, run_id: str) -> Iterator[Mirror]:
    """A function that shows one row of figures. Whatever fails here is said once, and the run goes on without."""
    run = None
    if config.wandb.mode != "disabled":
        try:
            run = start(config, name, run_id)
        except Exception as error:  # no package, no network, no disk: none of them is the run's business
            log.warning("W&B is off for this run (%s); metrics.jsonl has everything", error)

    def show(row: dict[str, float]) -> None:
        nonlocal run
        if run is not None:
            try:
                run.log(row, step=int(row["update"]))
            except Exception as error:
                log.warning("W&B stopped (%s); metrics.jsonl goes on", error)
                run = None

    try:
        yield show
    except BaseException:
        finish(run, exit_code=1)
        raise
    finish(run, exit_code=0)


def start(config: DictConfig, name: str, run_id: str) -> Any:
    import wandb  # takes a second, and a machine without a network may lack it

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
        return init()  # as it says
    try:
        if wandb.login(prompt=False):
            return init(mode="online")
    except Exception as error:
        log.warning("W&B cannot be reached (%s); what `wandb sync` needs is kept here", error)
    return init(mode="offline")


def finish(run: Any, exit_code: int) -> None:
    if run is not None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("W&B did not finish (%s); metrics.jsonl has everything", error)
