"""Make tables of the paper: `expire-span-paper table3 size=mini` runs what is missing, and writes the table.

RUNS/SIZE/PRESET/seedN       run folders, see expire_span/paper_sweeps.py
OUT/SIZE/table3.md, ...      the tables as Markdown, CSV, SVG and PNG; those of tuned settings in OUT/SIZE/tuned
OUT/claims.md                the paper's claims, judged from those tables: `expire-span-paper claims`
"""

import argparse
import hashlib
import math
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from expire_span.paper_claims import judge
from expire_span.paper_figures import draw
from expire_span.paper_rows import Row, is_finished, missing_seeds, row_config
from expire_span.paper_sweeps import obtain, sweeps
from expire_span.paper_tables import (
    SIZES,
    Table,
    csv_rows,
    markdown,
    num_holes,
    read_lines,
    read_table,
    table_names,
)
from expire_span.paper_tuning import SEED, Choice, choose, describe, points

from ..config.overrides import is_override, parse, quote
from ..errors import SHOW_TRACEBACK, USER_ERRORS, described, exit_with_message, root_cause
from ..run_folder.identity import is_below
from ..spans.describe import Request, describe_runs
from ..spans.page import page
from ..spans.picture import draw_spans
from ..stop_signals import Stopped, stop_signals
from .output_files import output_path, write_output
from .report import format_number

FREE = ("hydra", "run", "wandb")  # sections that change no result
OURS = ("hydra.sweep", "hydra.run", "hydra.mode", "wandb.group")  # by which the runs are found again
DATA = "task.path"  # the user's own text
CLAIMS = "claims"  # stands for the page that judges the paper's claims from the tables in OUT


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises ValueError for one that would change a result: a table's settings are those of its presets."""
    for override in map(parse, overrides):
        key = override.key_or_group
        if is_below(key, OURS):
            raise ValueError(f"{key} is how this command finds its runs; --runs FOLDER says where they are and will be")
        if key not in ("size", "tracker") and key.split(".")[0].split("/")[0] not in FREE:
            raise ValueError(
                f"{key} belongs to the presets of the table, which must not differ; run a variant with "
                f"expire-span experiment=PRESET {key}=..., or set tracker, {DATA}, or one of "
                f"{', '.join(f'{section}.*' for section in FREE)}; EXPIRE_SPAN_CACHE says where data lies"
            )


def select_tables(
    names: Sequence[str], size: str, seeds: Sequence[int], text: Path | None
) -> tuple[list[Table], list[str]]:
    """The tables of these names that have rows at a size, and why others of `all` are left out.

    Args:
        names: of tables, or all.
        size: one of SIZES.
        seeds: of every row; none: as many as each table says.
        text: the file or folder of tables of a text; runs of another text lie in other folders.

    Raises:
        ValueError: if a table is named that does not exist, or of which nothing can be run.
        OSError: if the text cannot be read.
    """
    tables, left_out = [], []
    for name in table_names() if "all" in names else dict.fromkeys(names):
        table = read_table(name, size, seeds)
        problem = "" if table.rows else f"{name} has no rows at size={size}"
        problem = problem or (f"{name} needs {DATA}=FILE, your text" if table.given and text is None else "")
        if problem and "all" not in names:
            raise ValueError(problem)
        if problem:
            left_out.append(problem)
            continue
        if table.given and text is not None:
            own, hashed = f"{DATA}={quote(str(text.absolute()))}", content_hash(text)
            rows = [
                row._replace(preset=f"{row.preset}-{hashed}", overrides=(*row.overrides, own)) for row in table.rows
            ]
            table = table._replace(rows=rows)
        tables.append(table)
    return tables, left_out


@cache
def content_hash(path: Path) -> str:
    """8 characters for what a file, or a folder of files, holds. Raises OSError if it cannot be read."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    hashes = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:8]


def text_path(given: Sequence[str]) -> Path | None:
    """The path that task.path=FILE names, with or without Hydra's quotes."""
    values = [text.partition("=")[2] for text in given if text.startswith(f"{DATA}=")]
    if not values:
        return None
    path = Path(values[-1]).expanduser()
    return path if path.exists() else Path(str(parse(f"{DATA}={values[-1]}").value())).expanduser()


def distinct_rows(tables: Sequence[Table]) -> list[Row]:
    """The rows of these tables, each once, with the seeds of all tables that have it."""
    rows: dict[str, Row] = {}
    for row in (row for table in tables for row in table.rows):
        seeds = {*row.seeds, *(rows[row.preset].seeds if row.preset in rows else ())}
        rows[row.preset] = row._replace(seeds=tuple(sorted(seeds)))
    return list(rows.values())


def tuned_table(table: Table, choices: Mapping[str, Choice]) -> Table:
    """The table with the settings that its tuning chose, by the names of its rows."""
    rows = [choices[row.preset].row._replace(seeds=row.seeds) for row in table.rows]
    return table._replace(rows=rows, command=f"{table.command} --tune")


def write_table(table: Table, size: str, runs: Path, out: Path, tuning: str = "") -> tuple[str, int]:
    """Write NAME.md, .csv, .svg and .png, or .html for a page; return the Markdown, and how many runs are lacking."""
    lines, left_out = read_lines(table, size, runs)
    rows = csv_rows(lines, runs)
    text = markdown(table, size, lines, left_out, tuning)
    if table.page is None:
        out.mkdir(parents=True, exist_ok=True)
        draw(table, size, lines, [out / f"{table.name}.{ending}" for ending in ("svg", "png")])
    else:
        shown = [folder for line in lines for folder in line.runs.get("folder", ()) if has_weights(Path(folder))]
        if shown:
            options = page_options(table.page, table.name, size, out)
            kinds = {str(Path(folder).relative_to(runs)): kinds_of_tokens(Path(folder), options) for folder in shown}
            rows = rows.join(pd.DataFrame.from_dict(kinds, orient="index"), on="folder")
            text += write_page(options, table, size, runs, out)
    write_output(out / f"{table.name}.md", text)
    write_output(out / f"{table.name}.csv", rows.to_csv(index=False))
    return text, num_holes(lines)


def page_options(settings: Mapping[str, Any], name: str, size: str, out: Path) -> dict[str, Any]:
    """What a page of a table shows, at a size, for `Request`; a text of its own is written beside the table."""
    options = {key: value.get(size) if key == "span_cap" else value for key, value in settings.items()}
    if "text" in options:
        write_output(out / f"{name}.txt", options["text"])
        options["text"] = out / f"{name}.txt"
    return options | {"replacements": list(options.get("replacements", {}).items())}


def has_weights(folder: Path) -> bool:
    """Whether a run is finished and can be shown, unlike one that --from-wandb has fetched."""
    return is_finished(folder) and (folder / "model.safetensors").is_file()


def kinds_of_tokens(folder: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """What a run keeps of each kind of token, as columns of the table's CSV.

    span/KIND is the mean span in timesteps, of each token in the layer where it is longest; more_bits/KIND what a token
    costs more if spans are capped.
    """
    request = Request([folder], **{key: options[key] for key in ("text", "max_tokens", "span_cap") if key in options})
    columns = {}
    for group in describe_runs(request)["texts"][0]["groups"]:
        columns[f"span/{group['name']}"] = group["longest"]
        columns |= {f"more_bits/{group['name']}": more for more in group["bits"][1:]}
    return columns


def write_page(options: Mapping[str, Any], table: Table, size: str, runs: Path, out: Path) -> str:
    """Write NAME.html and .png: what the first seed of each row remembers of a text; nothing without its weights.

    Returns:
        In Markdown, the mean span of each kind of token in each layer of the first row.
    """
    folders = [runs / size / row.preset / f"seed{row.seeds[0]}" for row in table.rows]
    if not all(map(has_weights, folders)):
        return ""
    data = describe_runs(Request(folders, **options))
    data |= {"run": table.rows[0].title, "command": table.command}
    if data["curves"]:
        for curve, row in zip(data["curves"]["runs"], table.rows, strict=True):
            curve["name"] = row.title
    write_output(out / f"{table.name}.html", page(data))
    draw_spans(data, out / f"{table.name}.png")
    columns = [
        *(f"layer {layer}" for layer in range(len(data["layers"]))),
        "longest",
        "loss, bits",
        "more with capped spans, bits",
    ]
    rows = []
    for group in data["texts"][0]["groups"]:
        numbers = [*group["spans"], group["longest"], *group["bits"]]
        values = map(format_number, (math.nan if number is None else float(number) for number in numbers))
        rows.append({"kind": group["name"], "number": group["count"]} | dict(zip(columns, values, strict=False)))
    kinds = pd.DataFrame(rows).to_markdown(index=False, tablefmt="github", disable_numparse=True)
    what = f"Mean span by kind of token, in timesteps ({data['run']}, seed {table.rows[0].seeds[0]}, {data['source']})"
    return f"\n{what}:\n\n{kinds}\n"


@contextmanager
def kept_for_the_end(failures: dict[str, str], name: str) -> Iterator[None]:
    """Keep why a table could not be made, so that the others are; a signal to stop is no error, and stops them all."""
    try:
        yield
    except Exception as error:
        error = root_cause(error)
        if SHOW_TRACEBACK or not isinstance(error, USER_ERRORS):
            traceback.print_exception(error)
        failures[name] = f"{name}: {described(error)}"


def check_composition(table: Table, size: str, runs: Path) -> None:
    """Compose the rows that are to be run: one of which Hydra makes no config would end the sweep of all tables."""
    for row in table.rows:
        if missing_seeds(row, size, runs):
            row_config(row.overrides)


def make(options: argparse.Namespace) -> list[str]:
    """Do what the command line says. Raises ValueError for bad input, before anything is begun.

    Returns:
        Which tables could not be made, and how many runs are missing; empty if all is there.
    """
    given = [text for text in options.arguments if is_override(text)]
    names = [text for text in options.arguments if text not in given]
    size = ([text.removeprefix("size=") for text in given if text.startswith("size=")] or ["mini"])[-1]
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size}")
    if not names:
        raise ValueError(f"name a table: {', '.join(table_names())}, claims, or all")
    if options.seeds and not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        raise ValueError(f"--seeds must be numbers with commas between them, as in 1,2,3, got {options.seeds}")
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else []
    if options.tune and SEED in seeds:
        raise ValueError(f"seed {SEED} is that of the tuning, which a table must not use")
    check_overrides([text for text in given if not text.startswith((f"{DATA}=", "size="))])
    overrides = [text for text in given if text.split("=")[0] not in ("size", DATA)]
    tables, left_out = select_tables([name for name in names if name != CLAIMS], size, seeds, text_path(given))
    runs, out = options.runs, options.out / size / ("tuned" if options.tune else "")
    failures: dict[str, str] = {}  # by table

    def sound_tables() -> list[Table]:
        return [table for table in tables if table.name not in failures]

    tried: dict[str, list[Row]] = {}
    for table in tables:
        with kept_for_the_end(failures, table.name):
            tried |= {row.preset: points(row) if options.tune else [] for row in table.rows}
            if not options.tune and not options.no_launch:
                check_composition(table, size, runs)
    rows = distinct_rows(sound_tables())
    of_tuning = [point for row in rows for point in tried[row.preset]]
    if options.dry_run:
        chosen = [choose(row, tried[row.preset], size, runs).row for row in rows] if options.tune else rows
        commands = sweeps(of_tuning, size, runs, overrides) or sweeps(chosen, size, runs, overrides)
        print("\n".join(f"expire-span {shlex.join(command)}" for command in commands) or "nothing is missing")
        return list(failures.values())
    if tables:
        out.mkdir(parents=True, exist_ok=True)  # before hours of runs, whose tables go there
    choices: dict[str, Choice] = {}
    if options.tune:
        obtain(of_tuning, size, runs, overrides, options.from_wandb, options.no_launch)
        for table in sound_tables():
            with kept_for_the_end(failures, table.name):
                choices |= {row.preset: choose(row, tried[row.preset], size, runs) for row in table.rows}
        rows = [choice.row for choice in choices.values()]
    obtain(rows, size, runs, overrides, options.from_wandb, options.no_launch)
    holes = 0
    for table in sound_tables():
        with kept_for_the_end(failures, table.name):
            own = [choices[row.preset] for row in table.rows] if options.tune else []
            table = tuned_table(table, choices) if options.tune else table
            text, lacking = write_table(table, size, runs, out, describe(own) if own else "")
            print(text)
            holes += lacking
    if {CLAIMS, "all"} & set(names):
        with kept_for_the_end(failures, CLAIMS):
            text = judge(options.out)
            write_output(options.out / f"{CLAIMS}.md", text)
            print(text)
    print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    problems = list(failures.values())
    missing = sum(len(missing_seeds(row, size, runs)) for row in [*of_tuning, *rows])
    if missing:
        problems.append(f"{missing} runs are missing; the same command goes on with them")
    elif holes:
        problems.append(f"{holes} runs have no place in their tables, which say why")
    return problems


def main(arguments: Sequence[str] | None = None) -> None:
    """The console command; user errors are one line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-paper",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make tables of the paper: run what is missing, then write each as Markdown, CSV, SVG and PNG,\n"
        "the paper's numbers beside ours. What is finished is not run again; what was cut short goes on.",
        epilog=f"tables: {', '.join(table_names())}, or all\n"
        "claims: judges the paper's claims from the tables that have been written\n"
        "  size=mini|paper     mini: minutes a run on two CPU cores; paper: the paper's own sizes (default mini)\n"
        "  task.path=FILE      the text of tables that need one\n"
        "  hydra.* run.* wandb.* tracker  passed on, as hydra.launcher.n_jobs=2 or hydra/launcher=slurm\n\n"
        "examples:\n  expire-span-paper table1 size=mini hydra.launcher.n_jobs=2 run.num_threads=1\n"
        "  expire-span-paper table3 size=mini --tune    the same, every model tuned with the same budget",
    )
    add = parser.add_argument
    add("arguments", nargs="+", metavar="TABLE|KEY=VALUE", help="tables, size=mini or size=paper, and overrides")
    add("--seeds", metavar="N,N", help="of every row (default: those of the table, 1,2,3 or more)")
    add("--tune", action="store_true", help="choose learning rate and one key of each model first (conf/tuning)")
    add("--runs", type=output_path, default=Path("runs/paper"), help="folder of the runs (default runs/paper)")
    add("--out", type=output_path, default=Path("results"), help="tables are written into OUT/SIZE (default results)")
    add("--from-wandb", metavar="ENTITY/PROJECT", help="take missing runs from W&B, where this command has made them")
    add("--no-launch", action="store_true", help="write the tables from the runs that there are")
    add("--dry-run", action="store_true", help="print the commands that would be run, and do nothing")
    options = parser.parse_intermixed_args(arguments)
    try:
        with stop_signals():
            problems = make(options)
    except Stopped as stop:
        print(stop.message, file=sys.stderr)
        raise
    except Exception as error:
        exit_with_message(error)
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
