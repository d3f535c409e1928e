"""Make tables of the paper: `expire-span-paper table3 size=mini` runs what is missing, and writes the table.

RUNS/SIZE/PRESET/seedN       run folders; one that was cut short goes on, one that is finished is not run again
OUT/SIZE/table3.md, ...      the tables as Markdown, CSV, SVG and PNG
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from expire_span.paper_tables import (
    SIZES,
    Table,
    is_finished,
    missing_seeds,
    preset_name,
    read_table,
    table_names,
    write,
)

from ..config.overrides import is_override, parse, quote
from ..errors import exit_with_message
from ..run_folder.config_files import load_config
from ..run_folder.files import read_metrics
from ..stop_signals import Stopped, heeded_signals

FREE = ("hydra", "run", "wandb")  # sections that change no result
SUBFOLDER = "hydra.sweep.subdir='{size}${{hydra:runtime.choices.experiment}}/seed${{seed}}'"


def sweeps(
    tables: Sequence[Table], size: str, seeds: Sequence[int], runs: Path, overrides: Sequence[str]
) -> list[list[str]]:
    """The arguments of the sweeps that make all that is missing: one for all rows that lack the same seeds."""
    presets_by_seeds: dict[tuple[int, ...], list[str]] = {}
    for preset in dict.fromkeys(preset for table in tables for preset in table.rows):
        if missing := missing_seeds(preset, size, seeds, runs):
            presets_by_seeds.setdefault(missing, []).append(preset_name(preset, size))
    folder = f"hydra.sweep.dir={quote(str(runs))}"
    subfolder = SUBFOLDER.format(size="" if size != "paper" else "paper/")
    return [
        [
            "-m",
            f"experiment={','.join(presets)}",
            f"seed={','.join(map(str, missing))}",
            folder,
            subfolder,
            "wandb.group='${hydra:runtime.choices.experiment}'",
            *overrides,
        ]
        for missing, presets in presets_by_seeds.items()
    ]


class Progress:
    """How much of all runs is done, and how long the rest takes at the pace since this was constructed."""

    def __init__(self, tables: Sequence[Table], size: str, seeds: Sequence[int], runs: Path):
        presets = dict.fromkeys(preset for table in tables for preset in table.rows)
        self.folders = [runs / size / preset / f"seed{seed}" for preset in presets for seed in seeds]
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
    if is_finished(folder):
        return 1
    try:
        update = read_metrics(folder / "metrics.jsonl")[-1]["update"]
        return min(update / load_config(folder).train.updates, 0.99)
    except (IndexError, KeyError, OSError, ValueError):
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


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for one that would change a result: a table's settings are those of its presets."""
    for override in map(parse, overrides):
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] not in FREE:
            raise ValueError(
                f"{key} belongs to the presets of the table, which must not differ; run a variant with "
                f"expire-span experiment=PRESET {key}=..., or set run.*, wandb.* or hydra.*"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        prog="expire-span-paper",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make tables of the paper: run what is missing, then write each as Markdown, CSV, SVG and PNG,\n"
        "the paper's numbers beside ours. What is finished is not run again; what was cut short goes on.",
        epilog=f"tables: {', '.join(table_names())}, or all\n"
        "  size=mini|paper     mini: minutes a run on two CPU cores; paper: the paper's own sizes (default mini)\n"
        "  hydra.* run.* wandb.*  passed on to expire-span, as hydra.launcher.n_jobs=2 or hydra/launcher=slurm\n\n"
        "example:\n  expire-span-paper table1 size=mini hydra.launcher.n_jobs=2 run.num_threads=1",
    )
    add = parser.add_argument
    add("arguments", nargs="+", metavar="TABLE or KEY=VALUE", help="tables, size=mini or size=paper, and overrides")
    add("--seeds", default="1,2,3", metavar="N,N", help="of every row (default 1,2,3)")
    add("--runs", type=Path, default=Path("runs/paper"), help="folder of the runs (default runs/paper)")
    add("--out", type=Path, default=Path("results"), help="tables are written into OUT/SIZE (default results)")
    add("--no-launch", action="store_true", help="write the tables from the runs that there are")
    add("--dry-run", action="store_true", help="print the commands that would be run, and do nothing")
    options = parser.parse_intermixed_args(arguments)
    try:
        given = [text for text in options.arguments if is_override(text)]
        names = [text for text in options.arguments if text not in given]
        size = ([text.removeprefix("size=") for text in given if text.startswith("size=")] or ["mini"])[-1]
        overrides = [text for text in given if not text.startswith("size=")]
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size}")
        if not names:
            raise ValueError(f"name a table: {', '.join(table_names())}, or all")
        if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
            raise ValueError(f"--seeds must be numbers with commas between them, as in 1,2,3, got {options.seeds}")
        seeds = [int(seed) for seed in options.seeds.split(",")]
        check_overrides(overrides)
        tables = [read_table(name) for name in (table_names() if "all" in names else dict.fromkeys(names))]
        commands = [] if options.no_launch else sweeps(tables, size, seeds, options.runs, overrides)
        if options.dry_run:
            print("\n".join(f"expire-span {shlex.join(command)}" for command in commands) or "nothing is missing")
            return
        progress = Progress(tables, size, seeds, options.runs)
        if commands:
            print(progress, flush=True)
        failed = [code for code in [launch(command, progress) for command in commands] if code]
        missing = 0
        for table in tables:
            text, number = write(table, size, seeds, options.runs, options.out / size)
            missing += number
            print(text)
        if missing or failed:
            raise ValueError(f"{missing} runs are missing; the same command goes on with them")
    except Stopped as stop:
        print(stop.message, file=sys.stderr)
        raise
    except Exception as error:
        exit_with_message(error)


if __name__ == "__main__":
    main()
