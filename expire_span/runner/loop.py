"""One loop for every task: take a block, step, log; evaluate; save."""

import logging
import math
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from ..kernels import operator
from ..transformer import Transformer
from .measures import Figures, peak_memory, reset_peak_memory
from .mirror import mirror
from .record import (
    append_metrics,
    provenance,
    read_metrics,
    truncate_metrics,
    write_alphabet,
    write_diff,
    write_summary,
    write_texts,
)
from .saved import open_run
from .schedule import alpha_factor, rate_factor, set_rates
from .training import Training, kind_of

log = logging.getLogger(__name__)
NOWHERE: Mapping[str, Any] = {}


def train(
    config: DictConfig,
    folder: Path,
    command: Sequence[str] = sys.argv,
    origin: Mapping[str, Any] = NOWHERE,
    texts: Mapping[str, str] = NOWHERE,
) -> Figures:
    """Train to the end, from the folder's checkpoint if it has one; evaluate; leave a summary. Returns its figures.

    origin: what the summary is to say of where the config's values come from; texts: files for the folder, which are
    written when nothing can refuse the run any more.
    """
    training = Training(config, folder)
    resumed = training.restore()
    write_texts(folder, texts)
    about = {**provenance(command), **origin}
    write_diff(folder)
    write_alphabet(folder, training.task)
    truncate_metrics(folder / "metrics.jsonl", training.update, config.train.updates)
    reset_peak_memory(training.device)
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    log.info(
        f"{'continuing' if resumed else 'training'} in {folder}: {parameters:,} parameters, on {training.device}, "
        f"updates {training.update} to {config.train.updates}"
    )
    with reporting(training) as report:
        with stop_signal() as stopped:
            while training.update < config.train.updates:
                train_update(training)
                last = training.update == config.train.updates
                if last or training.update % config.run.log_every == 0:
                    report(interval(training))
                if training.update % (config.evaluation.every or math.inf) == 0:
                    report(training.kind.evaluate(training.forward, training.task, "valid", config, training.device))
                stop = stopped.is_set()  # read once: what comes after this is for the next update
                if last or stop or training.update % config.run.checkpoint_every == 0:
                    training.save()
                if stop:
                    raise SystemExit(f"stopped at update {training.update}; to go on: expire-span resume={folder}")
        figures = costs(folder)
        for split in config.splits:
            figures |= training.kind.evaluate(training.forward, training.task, split, config, training.device)
        report(figures)
    model, task, device = training.model, training.task, training.device
    write_summary(folder, protocol(config, task, model, device, training.update, training.blocks, figures) | about)
    return figures


def train_update(training: Training) -> None:
    """One update of the weights, out of `train.accumulate` blocks."""
    config, model, optimiser = training.config, training.model, training.optimiser
    training.watch.start()
    model.train()
    set_rates(optimiser, rate_factor(training.update, config.train.updates, config.schedule))
    alpha = alpha_factor(training.update, config.schedule)
    for _ in range(config.train.accumulate):
        loss, figures = training.kind.step(training, alpha)
        (loss / config.train.accumulate).backward()
        training.meter.add(figures)
    norm = clip_grad_norm_(model.parameters(), config.train.clip or math.inf)
    training.meter.add({"train/gradient_norm": norm})
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    training.update += 1
    training.watch.stop()


def interval(training: Training) -> Figures:
    """The figures since the last reading. Raises ValueError where the loss is not a number."""
    training.refuse_nan()
    config = training.config
    blocks, training.blocks_read = training.blocks - training.blocks_read, training.blocks
    figures = training.kind.interval(training, training.meter.means())
    if blocks:  # else the block that these updates learned from is not done with
        milliseconds = training.watch.read() / blocks
        figures["perf/ms_per_batch"] = milliseconds
        figures["perf/tokens_per_second"] = 1000 * config.train.batch * config.train.block / milliseconds
    return figures | peak_memory(training.device)


def evaluate_run(
    config: DictConfig,
    run: Path,
    folder: Path,
    command: Sequence[str] = sys.argv,
    origin: Mapping[str, Any] = NOWHERE,
) -> Figures:
    """Evaluate the checkpoint of a run folder by its own config, perhaps changed; leave a summary in another folder."""
    _, task, model, device, update, blocks = open_run(run, config)
    reset_peak_memory(device)
    figures: Figures = {}
    for split in config.splits:
        figures |= kind_of(task).evaluate(model, task, split, config, device)
    figures |= peak_memory(device)
    append_metrics(folder / "metrics.jsonl", {"update": update, **figures})
    about = {**provenance(command), **origin}
    write_summary(folder, protocol(config, task, model, device, update, blocks, figures) | about)
    return figures


def costs(folder: Path) -> Figures:
    """Of the whole training, also where it was stopped and went on: times, as medians, and the peaks of memory.

    Times are of the second half of the intervals: by then a curriculum is over, and nothing is compiled any more.
    """
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
    timed = [row for row in rows if "perf/ms_per_batch" in row]
    late, names = timed[len(timed) // 2 :], ("perf/ms_per_batch", "perf/tokens_per_second")
    figures = {name: statistics.median(row[name] for row in late) for name in names} if late else {}
    peaks = {name for row in rows for name in row if name.startswith("perf/peak_")}
    return figures | {name: max(row[name] for row in rows if name in row) for name in sorted(peaks)}


@contextmanager
def reporting(training: Training) -> Iterator[Callable[[Figures], None]]:
    """A function that writes a row of figures where they belong: the file first, then W&B, then the terminal."""
    config, folder, measure = training.config, training.folder, training.task.measure
    watched = ("memory/size", "test/memory/size", "perf/ms_per_batch")
    bar = tqdm(total=config.train.updates, initial=training.update, disable=None if config.run.progress else True)
    with mirror(config, folder.name, training.run_id) as show, bar:

        def report(figures: Figures) -> None:
            row = {"update": training.update, **figures}
            append_metrics(folder / "metrics.jsonl", row)
            show(row)
            names = [name for name in row if name.endswith(f"/{measure}")] + [name for name in watched if name in row]
            words = [f"{name} {row[name]:.4g}" for name in names]
            bar.n = training.update
            bar.set_postfix_str(", ".join(words))
            if bar.disable:
                log.info(f"update {training.update}: {', '.join(words)}")

        yield report


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM, so that the update is finished and saved; the second one ends the process."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        log.warning("stopping once this update is saved; another Ctrl-C stops at once, and saves nothing")
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def protocol(
    config: DictConfig, task: Any, model: Transformer, device: torch.device, update: int, blocks: int, figures: Figures
) -> dict[str, Any]:
    """A run's figures and what gave them. Task and model go by the names of their files."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config))
    return {
        "finished": update >= config.train.updates,
        "task": type(task).__module__.split(".")[-1],
        "model": type(model.mechanisms[0]).__module__.split(".")[-1],
        "measure": task.measure,
        "data": getattr(task, "data", None),
        "figures": figures,
        "protocol": {
            "splits": list(config.splits),
            "updates": update,
            "tokens": blocks * config.train.batch * config.train.block,
            "batch": config.train.batch,
            "block": config.train.block,
            "evaluation_batch": config.evaluation.batch,
            "evaluation_block": config.evaluation.block,
            "evaluation_blocks": config.evaluation.blocks,
            "memory_at_start": "empty",
            "max_span": config.model.get("max_span"),
            "seed": config.seed,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "precision": config.run.precision,
            "attention": operator.form(model.config.kernel, device.type, model.position.dtype),
        },
        "config": {key: value for key, value in plain.items() if key != "wandb"},
    }
