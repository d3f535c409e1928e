"""Training: one loop for every task. Take a step, log, evaluate, save; at the end evaluate and write a summary."""

import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from expire_span.tasks.base import EnvError

from . import ranks
from .errors import OutOfMemory, is_out_of_memory
from .eviction import evicting
from .logging.media import Media, final_media, span_histograms
from .logging.metrics import Metrics
from .logging.performance import peak_memory, reset_peak_memory
from .logging.profiler import profiler
from .logging.throughput import throughput
from .logging.trackers import check_installed, trackers
from .lr_schedule import alpha_multiplier, lr_multiplier, set_lr
from .milestones import expectation, far_behind
from .run_folder import checkpoint
from .run_folder.files import (
    WriteError,
    append_metrics,
    read_metrics,
    truncate_metrics,
    write_summary,
    write_texts,
    write_vocab,
)
from .run_folder.identity import MAY_CHANGE
from .run_folder.provenance import provenance, write_diff
from .run_folder.summary import run_summary
from .stop_signals import StopHandler, Stopped, stop_signals
from .trainer import Trainer

log = logging.getLogger(__name__)
EMPTY: Mapping[str, Any] = {}


def train(
    config: DictConfig,
    folder: Path,
    command: Sequence[str] = sys.argv,
    summary_extras: Mapping[str, Any] = EMPTY,
    config_files: Mapping[str, str] = EMPTY,
    changeable: Sequence[str] = MAY_CHANGE,
) -> Metrics:
    """Train to the end, from the folder's checkpoint if it has one; evaluate; write a summary.

    Args:
        config: As `config.schema.validate` returns it.
        folder: the run folder.
        command: the command line, for the summary.
        summary_extras: further entries of the summary, such as where the config's values come from.
        config_files: Texts by their paths in the folder, written after all checks have passed.
        changeable: Sections and keys of the config that may have other values than the run that the folder holds.

    Returns:
        the final metrics.
    """
    with stop_signals() as stop, say_how_to_go_on(folder):
        with ranks.failing_together():
            check_installed(config)
            trainer = Trainer(config, folder)
        ranks.copy_from_main(trainer.model)
        with ranks.failing_together():
            resumed = trainer.load_checkpoint(changeable)
        if ranks.is_main():
            truncate_metrics(folder / "metrics.jsonl", trainer.update, config.train.updates)  # refuses damaged ones
            write_texts(folder, config_files)
            write_diff(folder)
            write_vocab(folder, trainer.task)
        origin = {**provenance(command), **summary_extras}
        reset_peak_memory(trainer.device)
        num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        log.info(
            f"{'resuming' if resumed else 'training'} in {folder}: {num_parameters:,} parameters, on {trainer.device}, "
            f"updates {trainer.update} to {config.train.updates}"
        )
        if expected := expectation(config, trainer.task):
            log.info(expected)
        with metric_logger(trainer) as log_metrics, trainer.writing_checkpoints():
            ranks.wait_for_all()  # for rank 0 to reach the trackers
            profiled = config.run.profile and ranks.is_main()
            with stop.deferred(), profiler(profiled, folder, trainer.device) as next_update:
                is_stopped = False
                while trainer.update < config.train.updates and not is_stopped:
                    with saved_before_env_errors(trainer):
                        is_stopped = step_log_and_save(trainer, log_metrics, stop)
                    ranks.set_timeout(config.run.rank_timeout)  # the first update may have compiled for minutes
                    next_update()
                    if config.run.profile:
                        ranks.wait_for_all()  # for rank 0 to write what it has recorded
                trainer.finish_checkpoint()
                stop.number = agreed_signal(stop)
            metrics = training_costs(folder)
            for split in config.eval.splits:
                metrics |= evaluate(trainer, split)
            log_metrics(metrics)
            task, model, objective = trainer.task, trainer.model, trainer.objective
            summary = run_summary(config, task, model, trainer.device, trainer.update, objective.blocks, metrics)
            if ranks.is_main():
                behind = far_behind(config, task, read_metrics(folder / "metrics.jsonl"))
                write_summary(folder, summary | origin | {"changes": trainer.changes, "far_behind": behind})
            log_metrics({}, lambda: final_media(model, task, config, trainer.device, metrics))
    return metrics


def step_log_and_save(trainer: Trainer, log_metrics: Callable[..., None], stop: StopHandler) -> bool:
    """One update, and what is due after it. Returns whether a signal has stopped the training."""
    config = trainer.config
    train_step(trainer)
    is_stopped = agreed_signal(stop) is not None
    is_last = trainer.update == config.train.updates
    if is_last or trainer.update % config.run.log_every == 0:
        states = trainer.states
        log_metrics(interval_metrics(trainer), lambda: span_histograms(trainer.model, states.wait()[0], trainer.device))
    if trainer.update % (config.eval.interval or math.inf) == 0:
        trainer.check_finite()
        metrics = evaluate(trainer, "valid")
        log_metrics(metrics)
        trainer.save_if_best(metrics)
        ranks.wait_for_all()
    if is_last or is_stopped or trainer.update % config.run.checkpoint_every == 0:
        trainer.start_checkpoint()
    return is_stopped


@contextmanager
def saved_before_env_errors(trainer: Trainer) -> Iterator[None]:
    """Save what has been learned when an environment fails, unless other processes would have to take part."""
    try:
        yield
    except EnvError:
        if trainer.update > trainer.saved_update and ranks.world_size() == 1:
            trainer.save_checkpoint()
            log.warning(f"an environment has failed; {checkpoint.how_to_go_on(trainer.folder)}")
        raise


def agreed_signal(stop: StopHandler) -> int | None:
    """The number of a signal that any rank has received, so that all of them stop after the same update."""
    return int(ranks.max_numbers([stop.number or 0])[0]) or None


def train_step(trainer: Trainer) -> None:
    """One update of the weights, from `train.grad_accumulation` blocks, each in micro-batches of the streams."""
    config, model, optimizer, objective = trainer.config, trainer.model, trainer.optimizer, trainer.objective
    start = trainer.timer.now()
    model.train()
    lr_scale = lr_multiplier(trainer.update, config.train.updates, config.lr_schedule)
    set_lr(optimizer, lr_scale)
    scheduled = alpha_multiplier(trainer.update, config.alpha_schedule)
    span_loss_scale = scheduled * (trainer.budget.scale if trainer.budget else 1.0)
    progress = trainer.update / config.train.updates
    for _ in range(config.train.grad_accumulation):
        block = objective.next_block(trainer.forward, trainer.states)
        for index in range(len(trainer.states)):
            loss = objective.loss(trainer.forward, block, trainer.states, index, span_loss_scale, progress)
            (loss / config.train.grad_accumulation).backward()
    ranks.sum_gradients(model.parameters())
    grad_norm = clip_grad_norm_(model.parameters(), config.train.grad_clip or math.inf)
    averaged = {"train/grad_norm": grad_norm, "train/lr": optimizer.param_groups[0]["lr"]}
    if "alpha" in config.model:
        averaged["train/alpha"] = config.model.alpha * span_loss_scale
    trainer.averager.add_share(averaged, 1 / ranks.world_size())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trainer.update += 1
    held = trainer.states.pop_held()  # None where a rollout is learned from once more
    if trainer.budget and scheduled and held is not None:
        trainer.budget.step(ranks.sum_numbers([held])[0] / ranks.world_size(), lr_scale)
    if trainer.update % config.train.curriculum_interval == 0:
        objective.advance_curriculum()
    trainer.timer.add("update", start)


def interval_metrics(trainer: Trainer) -> Metrics:
    """The metrics since the last log. Raises ValueError if a loss or gradient norm is not finite."""
    trainer.check_finite()
    metrics = trainer.objective.summarize(trainer.averager.pop_means())
    metrics |= trainer.objective.time_metrics(*trainer.timer.pop())
    metrics |= throughput(trainer.config, trainer.model, trainer.device, metrics)
    return metrics | peak_memory(trainer.device)


def evaluate(trainer: Trainer, split: str) -> Metrics:
    """The metrics of one split under the current weights."""
    with evicting(trainer.model, trainer.config):
        return trainer.objective.evaluate(trainer.forward, trainer.task, split, trainer.config, trainer.device)


def training_costs(folder: Path) -> Metrics:
    """Time and peak memory of the whole training, also of one that was interrupted and resumed.

    Times are medians over the second half of the logging intervals, when a curriculum has ended and nothing is
    compiled any more; memory is the largest peak.
    """
    if not ranks.is_main():
        return {}
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
    metrics = {}
    for name in sorted({name for row in rows for name in row if name.startswith("perf/")}):
        values = [row[name] for row in rows if name in row]
        is_peak = name.startswith("perf/peak_")
        metrics[name] = max(values) if is_peak else statistics.median(values[len(values) // 2 :])
    return metrics


@contextmanager
def metric_logger(trainer: Trainer) -> Iterator[Callable[..., None]]:
    """Yield a function that logs a row of metrics: to metrics.jsonl first, then to the trackers and the terminal.

    Its second argument makes what the trackers show beside the row; without any metrics they show that alone.
    """
    if not ranks.is_main():
        yield lambda metrics, make_media=dict: None
        return
    config, folder = trainer.config, trainer.folder
    shown = ("memory/size", "test/memory/size", "perf/ms_per_batch")
    disable = None if config.run.progress_bar else True  # None: only where there is no terminal
    progress_bar = tqdm(total=config.train.updates, initial=trainer.update, disable=disable)
    path = folder / "metrics.jsonl"
    earlier_rows = read_metrics(path) if path.exists() else []
    rows = [*earlier_rows]
    metric = trainer.task.metric
    with trackers(config, folder, trainer.run_id, metric, trainer.update, earlier_rows) as log_row, progress_bar:

        def log_metrics(metrics: Metrics, make_media: Callable[[], Media] = dict) -> None:
            row = {"update": trainer.update, **metrics}
            if not metrics:
                log_row(row, make_media)
                return
            append_metrics(path, row)
            log_row(row, make_media)
            previous = rows[-1]["update"] if rows else 0
            rows.append(row)
            for message in far_behind(config, trainer.task, rows, since=previous):
                log.warning(message)
            names = [name for name in row if name.endswith(f"/{metric}")]
            names += [name for name in shown if name in row]
            text = ", ".join(f"{name} {row[name]:.4g}" for name in names)
            progress_bar.n = trainer.update
            progress_bar.set_postfix_str(text)
            if progress_bar.disable:
                log.info(f"update {trainer.update}: {text}")

        yield log_metrics


@contextmanager
def say_how_to_go_on(folder: Path) -> Iterator[None]:
    """Let a signal, a failed write or a lack of memory end the training with what is saved and how to go on."""
    try:
        yield
    except Stopped as stop:
        raise Stopped(stop.number, f"stopped; {checkpoint.how_to_go_on(folder)}") from None
    except (WriteError, ranks.RankLostError) as error:
        raise type(error)(f"{error}; {checkpoint.how_to_go_on(folder)}") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        saved = checkpoint.how_to_go_on(folder) if checkpoint.paths(folder) else "nothing is saved yet"
        raise OutOfMemory(error, saved) from None
