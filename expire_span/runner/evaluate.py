"""Evaluate the checkpoint of a finished or stopped run."""

import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from . import ranks
from .eviction import evicting
from .load_run import load_run
from .logging.media import final_media
from .logging.metrics import Metrics
from .logging.performance import peak_memory, reset_peak_memory
from .logging.trackers import check_installed, trackers
from .micro_batches import resolve_micro_batch_size
from .objectives import objective_class
from .run_folder.files import append_metrics, write_summary, write_texts
from .run_folder.provenance import provenance
from .run_folder.summary import run_summary


def evaluate_run(
    config: DictConfig,
    run_folder: Path,
    folder: Path,
    command: Sequence[str] = sys.argv,
    summary_extras: Mapping[str, Any] | None = None,
    config_files: Mapping[str, str] | None = None,
) -> Metrics:
    """Evaluate a run's checkpoint with its own config, possibly changed, and write a summary to another folder.

    Args:
        config: As `config.schema.validate` returns it.
        run_folder: the run to evaluate.
        folder: where metrics.jsonl and summary.json go.
        command, summary_extras: for the summary, as in `train`.
        config_files: texts by their paths in the folder, written with the results: an evaluation that fails leaves
            nothing that looks like a run.
    """
    ranks.set_timeout(config.run.rank_timeout)
    with ranks.failing_together():
        check_installed(config)
        run = load_run(run_folder, config)
    num_streams = ranks.own_streams(config.eval.batch_size, "eval.batch_size")
    resolve_micro_batch_size(config, run.task, run.device, num_streams.stop - num_streams.start)
    reset_peak_memory(run.device)
    metrics: Metrics = {}
    with evicting(run.model, config):
        for split in config.eval.splits:
            metrics |= objective_class(run.task).evaluate(run.model, run.task, split, config, run.device)
    metrics |= peak_memory(run.device)
    origin = {**provenance(command), **(summary_extras or {})}
    summary = run_summary(config, run.task, run.model, run.device, run.update, run.blocks, metrics)
    if ranks.is_main():
        write_texts(folder, config_files or {})
        append_metrics(folder / "metrics.jsonl", {"update": run.update, **metrics})
        write_summary(folder, summary | origin)
        new_id, metric = uuid.uuid4().hex[:8], run.task.metric
        with trackers(config, folder, new_id, metric, job_type="evaluation", trained_run=run.run_id) as log_row:
            log_row({"update": run.update, **metrics})
            log_row({"update": run.update}, lambda: final_media(run.model, run.task, config, run.device, metrics))
    return metrics
