"""Trackers show the metrics of a run: W&B, TensorBoard, both or none. A run never depends on them.

A tracker is a context manager that yields a function of a row of metrics and the media that belong to it.
"""

import difflib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from .media import Media
from .tensorboard_logger import tensorboard_logger
from .wandb_logger import check_wandb, wandb_logger

log = logging.getLogger(__name__)

LABELS = {"wandb": "W&B", "tensorboard": "TensorBoard"}
LogRow = Callable[[Mapping[str, float], Media], None]


def check_trackers(config: DictConfig) -> None:
    """Raises ValueError for a tracker that does not exist, or settings of W&B that it would refuse."""
    tracker = config.tracker
    names = list(tracker) if isinstance(tracker, ListConfig) else [tracker]
    for name in names:
        if name not in (*LABELS, "none"):
            close = difflib.get_close_matches(str(name), (*LABELS, "none"), 1)
            advice = f"did you mean {close[0]}?" if close else "both are tracker=[wandb,tensorboard]"
            raise ValueError(
                f"tracker must be wandb, tensorboard or none, got {'null' if name is None else name}; {advice}"
            )
    if "none" in names and len(names) > 1:
        raise ValueError(f"tracker=none stands alone, got [{','.join(names)}]")
    check_wandb(config)


def tracker_names(config: DictConfig) -> list[str]:
    """The trackers that a run has: those of `tracker`, but for W&B where wandb.mode is disabled."""
    names = dict.fromkeys(config.tracker if isinstance(config.tracker, ListConfig) else [config.tracker])
    return [name for name in names if name != "none" and (name, config.wandb.mode) != ("wandb", "disabled")]


def check_installed(config: DictConfig) -> None:
    """Raises ValueError if TensorBoard is asked for and not installed. W&B is, with the project."""
    if "tensorboard" in tracker_names(config) and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tracker=tensorboard needs TensorBoard: pip install 'expire-span[tensorboard]', or choose tracker=wandb"
        )


@contextmanager
def trackers(
    config: DictConfig,
    folder: Path,
    run_id: str,
    metric: str,
    update: int = 0,
    earlier_rows: Iterable[Mapping[str, float]] = (),
    job_type: str | None = None,
    trained_run: str | None = None,
) -> Iterator[Callable[..., None]]:
    """Yield a function that shows one row of metrics, and media that are made only if there is a tracker to show them.

    Args:
        config: of the run.
        folder: of the run; its name is that of the W&B run.
        run_id: W&B's id of the run, so that a resumed run continues the same one.
        metric: of the task, as in `wandb_logger`.
        update: from which a resumed run goes on.
        earlier_rows: what a resumed run has logged before; a tracker gets those rows that it lacks.
        job_type, trained_run: of `wandb_logger`, for what does not train.
    """
    rows = list(earlier_rows)
    openers: dict[str, Callable[[], AbstractContextManager[LogRow]]] = {
        "wandb": lambda: wandb_logger(config, folder, run_id, metric, rows, job_type, trained_run),
        "tensorboard": lambda: tensorboard_logger(folder, update, rows),
    }
    is_warned = False
    with ExitStack() as stack:
        loggers = [stack.enter_context(isolated(LABELS[name], openers[name]())) for name in tracker_names(config)]

        def log_row(row: Mapping[str, float], make_media: Callable[[], Media] = dict) -> None:
            nonlocal is_warned
            media: Media = {}
            try:
                media = make_media() if loggers else {}
            except Exception as error:
                if not is_warned:
                    log.warning("no histogram, table or picture beside the metrics (%s); the metrics go on", error)
                is_warned = True
            for logger in loggers:
                logger(row, media)

        yield log_row


@contextmanager
def isolated(label: str, tracker: AbstractContextManager[LogRow]) -> Iterator[LogRow]:
    """Report any failure of a tracker once, after which the run continues without it."""
    log_row = None
    try:
        log_row = tracker.__enter__()
    except Exception as error:  # no package, no network, no disk space: none of them may stop the run
        log.warning("%s is off for this run (%s); nothing else is lost", label, error)
    if log_row is None:
        yield lambda row, media: None
        return
    works = True

    def log_while_it_works(row: Mapping[str, float], media: Media) -> None:
        nonlocal works
        if works:
            try:
                log_row(row, media)
            except Exception as error:
                log.warning("%s stopped (%s); nothing else did", label, error)
                works = False

    def close(error: BaseException | None) -> None:
        try:
            tracker.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as failure:
            if works and failure is not error:
                log.warning("%s did not finish (%s); nothing else is lost", label, failure)

    try:
        yield log_while_it_works
    except BaseException as error:
        close(error)
        raise
    close(None)
