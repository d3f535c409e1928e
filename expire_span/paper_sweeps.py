"""The runs of the paper's tables: what is missing of them is run by sweeps, or fetched from W&B.

RUNS/SIZE/PRESET/seedN     run folders; one that was cut short goes on, one that is finished is not run again
RUNS/conf/experiment/      presets of rows that conf/experiment does not have: points of curves, tuned settings
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from .paper_rows import Row, is_over, missing_seeds, preset_content, preset_name
from .runner.config.overrides import quote
from .runner.logging.wandb_runs import fetch_summaries
from .runner.run_folder.config_files import load_config
from .runner.run_folder.files import read_metrics
from .runner.stop_signals import Stopped, heeded_signals

SUBFOLDER = "hydra.sweep.subdir='{size}${{hydra:runtime.choices.experiment}}/seed${{seed}}'"
HEADER = """# @package _global_
# (c) throughout, written by expire-span-paper
# expire-span --config-dir={folder} experiment={name}
"""


def obtain(
    rows: Sequence[Row], size: str, runs: Path, overrides: Sequence[str], from_wandb: str | None, no_launch: bool
) -> None:
    """Fetch and run what is missing of these rows."""
    if from_wandb is not None:
        wanted = {
            (preset_name(row.preset, size), seed): runs / size / row.preset / f"seed{seed}"
            for row in rows
            for seed in missing_seeds(row, size, runs)
        }
        print(f"{fetch_summaries(from_wandb, wanted)} of {len(wanted)} missing runs are in W&B", flush=True)
    if no_launch:
        return
    commands, progress = sweeps(rows, size, runs, overrides), Progress(rows, size, runs)
    if commands:
        print(progress, flush=True)
    write_presets(rows, size, runs)
    for command in commands:
        launch(command, progress)  # a job that fails leaves a hole, which the tables and the exit code tell


def sweeps(rows: Sequence[Row], size: str, runs: Path, overrides: Sequence[str]) -> list[list[str]]:
    """The arguments of the sweeps that make all that is missing: one for all rows that lack the same seeds."""
    presets_by_seeds: dict[tuple[int, ...], dict[str, None]] = {}
    for row in rows:
        if row.overrides and (missing := missing_seeds(row, size, runs)):
            presets_by_seeds.setdefault(missing, {})[preset_name(row.preset, size)] = None
    common = [f"hydra.sweep.dir={quote(str(runs))}", SUBFOLDER.format(size="" if size != "paper" else "paper/")]
    common += ["wandb.group='${hydra:runtime.choices.experiment}'", *overrides]
    if any(not in_conf(row, size) for row in rows):
        common += [f"--config-dir={(runs / 'conf').absolute()}"]
    return [
        ["-m", f"experiment={','.join(presets)}", f"seed={','.join(map(str, missing))}", *common]
        for missing, presets in presets_by_seeds.items()
    ]


def in_conf(row: Row, size: str) -> bool:
    """Whether a row is a preset of conf/experiment as it stands."""
    return row.overrides in ((), (f"experiment={preset_name(row.preset, size)}",))


def write_presets(rows: Sequence[Row], size: str, runs: Path) -> None:
    """Write the presets of rows that conf/experiment does not have."""
    folder = runs / "conf"
    for row in rows:
        if not in_conf(row, size):
            name = preset_name(row.preset, size)
            path = folder / "experiment" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = HEADER.format(folder=folder, name=name)
            path.write_text(header + yaml.safe_dump(preset_content(row.overrides), sort_keys=False), encoding="utf-8")


class Progress:
    """How much of all runs is done, and how long the rest takes at the pace since this was constructed."""

    def __init__(self, rows: Sequence[Row], size: str, runs: Path):
        self.folders = [runs / size / row.preset / f"seed{seed}" for row in rows for seed in row.seeds]
        self.start, self.done_before = time.monotonic(), sum(map(done_share, self.folders))

    def __str__(self) -> str:
        shares = list(map(done_share, self.folders))
        text = f"{shares.count(1)} of {len(shares)} runs are done, {sum(0 < share < 1 for share in shares)} begun"
        if (made := sum(shares) - self.done_before) > 0:
            seconds = (time.monotonic() - self.start) * (len(shares) - sum(shares)) / made
            text += (
                f", about {seconds / 3600:.1f} hours left" if seconds > 5400 else f", about {seconds / 60:.0f} min left"
            )
        return text


def done_share(folder: Path) -> float:
    """The part of its updates that a run has logged."""
    if is_over(folder):
        return 1
    try:
        update = read_metrics(folder / "metrics.jsonl")[-1]["update"]
        return min(update / load_config(folder).train.updates, 0.99)
    except Exception:  # damaged files of one run must not end the sweep of all
        return 0


def launch(arguments: Sequence[str], progress: object = "", seconds: float = 60) -> int:
    """Run a sweep, and tell the progress now and then; a signal is passed on to it, which saves and ends."""
    print(f"expire-span {shlex.join(arguments)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    process = subprocess.Popen([sys.executable, "-m", "expire_span", *arguments], env=environment, process_group=0)
    stopped = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        process.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        while (code := process.poll()) is None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                print(progress, flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        raise Stopped(stopped[0], "stopped; the same command goes on")
    return code
