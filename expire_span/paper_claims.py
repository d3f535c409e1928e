"""The paper's claims, judged from the tables that `expire-span-paper` has written.

conf/claims.yaml has each claim with its checks, of one table each:

    {table: table1, better: Expire-Span 128k, than: Transformer-XL 2k}      two rows, by their titles
    {table: figure6, no_better: Expire-Span 32k, than: Expire-Span 16k, margin: 0.005}
    {table: figure7, at_equal_memory: expire_span, than: trans_xl}          two curves, by their models
    {table: figure5, with_less_memory: expire_span, than: trans_xl, margin: 0.05}
    {table: figure12, metric: span, more_for: newlines, than: frequent words}     two kinds of tokens, of the same runs

The metric is the table's first one unless a check names another. Differences are of means over seeds, with Welch's 95 %
interval (those of kinds of tokens are within a run, with Student's): shown means that it lies wholly on the claimed
side of 0, contradicted that it lies wholly on the other. Where a claim says that one is as good as the other, a margin
takes the place of 0: that a difference is not seen, as with few seeds or wide intervals, shows nothing.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
from omegaconf import OmegaConf

from .paper_rows import CONF
from .paper_statistics import (
    CONTRADICTED,
    NOT_RUN,
    NOT_SHOWN,
    SHOWN,
    Finding,
    Sample,
    compare,
    half_width,
    lower_is_better,
    sample,
)
from .paper_tables import SIZES, head, measured, read_table, scaled, table_names
from .runner.commands.report import format_number, format_seeds

HELD = "memory/held"


def table_runs(folder: Path, name: str) -> tuple[str, pd.DataFrame]:
    """The runs of a table that was written below a folder, a line each, and at what size; none, if it was not.

    Of a table that was made several times counts the first complete one, or else the first one, of: the paper's size
    tuned, the paper's size, the mini tuned, the mini.
    """
    candidates = []
    for size in reversed(SIZES):
        for subfolder in ("tuned", ""):
            path = folder / size / subfolder / f"{name}.csv"
            if path.is_file() and "model" in (runs := read_csv(path)):
                candidates.append((f"{size}{', tuned' if subfolder else ''}", runs))
    if not candidates:
        return "", pd.DataFrame({"row": [], "model": []})
    size, runs = next((table for table in candidates if is_complete(table[1])), candidates[0])
    return size, runs[runs["model"].notna()]


def is_complete(runs: pd.DataFrame) -> bool:
    """Whether every row of a table has as many seeds as it was to have."""
    if "planned_seeds" not in runs:
        return bool(runs["model"].notna().all())
    return bool((runs["model"].notna().groupby(runs["row"]).sum() >= runs.groupby("row")["planned_seeds"].max()).all())


def read_csv(path: Path) -> pd.DataFrame:
    """A table's runs. Raises ValueError for a damaged file."""
    try:
        return pd.read_csv(path, low_memory=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); the table's command writes it anew") from error


def rows_of_one_setting(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The runs without those of rows that have runs of several settings, and the titles of these rows."""
    if "line" not in runs:
        return runs, []
    is_mixed = runs.groupby("row")["line"].transform("nunique") > 1
    return runs[~is_mixed], list(dict.fromkeys(runs["row"][is_mixed]))


def judge(folder: Path) -> str:
    """Judge all claims, and every row that has a number of the paper, from the tables below a folder; in Markdown.

    Raises:
        ValueError: if there is no table at all.
    """
    if not any(table_runs(folder, name)[0] for name in table_names()):
        raise ValueError(f"there are no tables in {folder}: make some first, as by expire-span-paper table1 size=mini")
    content: Any = OmegaConf.to_container(OmegaConf.create((CONF / "claims.yaml").read_text()))
    verdicts, details = [], []
    for number, claim in enumerate(content, 1):
        findings = [check(folder, settings) for settings in claim["checks"]]
        tables = dict.fromkeys(settings["table"] for settings in claim["checks"])
        sizes = [size for name in tables if (size := table_runs(folder, name)[0])]
        verdict = overall([finding.verdict for finding in findings])
        if verdict != NOT_RUN and not all(size.startswith("paper") for size in sizes):
            verdict += ", at small size"
        verdicts.append({"": number, "claim": claim["claim"], "the paper": claim["paper"], "verdict": verdict})
        lines = [f"- {finding.text}: {finding.verdict}." for finding in findings]
        lines += [f"- {note}" for note in claim.get("notes", [])]
        given = dict.fromkeys(f" {key}=FILE" for name in tables for key in read_table(name, "mini").given)
        tune = " --tune" if not sizes or any("tuned" in size for size in sizes) else ""
        command = f" `expire-span-paper {' '.join(tables)} size=mini{tune}{''.join(given)}`" if tables else ""
        heading = f"## {number}. {claim['claim']}\n\nThe paper: {claim['paper']}.{command}"
        details.append("\n".join([heading, "", *lines]))
    parts = [
        "# The paper's claims",
        "`expire-span-paper claims`",
        "Means over seeds, with 95 % intervals of their differences (Welch; of kinds of tokens within a run: Student). "
        "Shown: the interval lies on the side that the claim says. Contradicted: on the other. Not shown: it includes "
        "0. Where one is claimed to be as good as the other, a margin (in conf/claims.yaml) takes the place of 0. At "
        "small size: with simpler tasks and smaller models (minis).",
        to_markdown(verdicts),
        *details,
        f"## Every row\n\n{to_markdown(row_verdicts(folder))}",
    ]
    return "\n\n".join(parts) + "\n"


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of these rows."""
    return str(pd.DataFrame(rows).to_markdown(index=False, tablefmt="github", disable_numparse=True))


def overall(verdicts: Sequence[str]) -> str:
    """The verdict of a claim, from those of its checks."""
    judged = [verdict for verdict in verdicts if verdict != NOT_RUN]
    if not judged:
        return NOT_RUN
    counts = [f"{verdict} in {judged.count(verdict)}" for verdict in (SHOWN, CONTRADICTED) if verdict in judged]
    text = judged[0] if len(set(judged)) == 1 else f"{' and '.join(counts)} of {len(judged)} checks"
    missing = len(verdicts) - len(judged)
    return f"{text}, {missing} of {len(verdicts)} not run" if missing else text


def check(folder: Path, settings: Mapping[str, Any]) -> Finding:
    """Make one check. Raises ValueError if it is of no kind that there is."""
    table = read_table(settings["table"], "mini")
    size, runs = table_runs(folder, table.name)
    runs, mixed = rows_of_one_setting(runs)
    measured_metrics = [metric for metric in table.metrics if len(measured(metric, runs))]
    metric = settings.get("metric", (measured_metrics or table.metrics)[0])
    for kind, function in CHECKS.items():
        if kind in settings:
            finding = function(runs, metric, settings[kind], settings["than"], float(settings.get("margin", 0)))
            where = f"{table.name}{f' ({size})' if size else ''}"
            if mixed:
                where += f" without {', '.join(mixed)}, of which there are runs of several settings"
            return finding._replace(text=f"{where}: {finding.text}")
    raise ValueError(f"conf/claims.yaml: a check has one of {', '.join(CHECKS)}, not {', '.join(settings)}")


def better(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a row is better than another by more than a margin."""
    text = f"{one} better than {other} ({head(metric)})"
    ours, theirs = (sample_of_row(runs[runs["row"] == title], metric) for title in (one, other))
    return compare(text, metric, ours, theirs, margin)


def no_better(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a row is better than another by at most a margin."""
    finding = better(runs, metric, one, other, margin)
    verdict = {SHOWN: CONTRADICTED, CONTRADICTED: SHOWN}.get(finding.verdict, finding.verdict)
    return Finding(finding.text.replace("better than", "no better than", 1), verdict)


def sample_of_row(runs: pd.DataFrame, metric: str) -> Sample | None:
    """The mean of a metric over the seeds of a row."""
    return sample(measured(metric, runs), planned_seeds(runs))


def planned_seeds(runs: pd.DataFrame) -> int:
    """How many seeds a row was to have; 0 if its table does not say."""
    return int(runs["planned_seeds"].max()) if "planned_seeds" in runs and len(runs) else 0


def at_equal_memory(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a model is better than another where both hold as many memories.

    The other's quality lies on straight lines between its rows, of which each has at least the quality of those that
    hold less. Of a row of the first that holds less than the other's least, the other's least counts, and none that
    holds more than the other's most.
    """
    text = f"{one} better than {other} at equal memory"
    rows, others = curve(runs, metric, one), curve(runs, metric, other)
    if not rows or not others:
        return Finding(text, NOT_RUN)
    rows = [(held, sample) for held, sample in rows if held <= others[-1][0]]
    if not rows:
        return Finding(f"{text}: each row of {one} holds more than every row of {other}", NOT_RUN)
    others = best_so_far(others, metric)
    findings = [
        compare(f"{format_number(held, 3)} held", metric, sample, interpolate(others, held), margin)
        for held, sample in rows
    ]
    return Finding(f"{text}: {'; '.join(finding.text for finding in findings)}", combine(findings))


def best_so_far(points: Sequence[tuple[float, Sample]], metric: str) -> list[tuple[float, Sample]]:
    """A curve on which more memory is never worse: a model that may hold more can be built with less."""
    sign = -1 if lower_is_better(metric) else 1
    rising = list(points[:1])
    for held, quality in points[1:]:
        best = rising[-1][1]
        rising.append((held, quality if sign * quality.mean > sign * best.mean else best))
    return rising


def combine(findings: Sequence[Finding]) -> str:
    """The verdict of a check of several points: of all, or not shown."""
    verdicts = {finding.verdict for finding in findings}
    return verdicts.pop() if len(verdicts) == 1 else NOT_SHOWN


def curve(runs: pd.DataFrame, metric: str, model: str) -> list[tuple[float, Sample]]:
    """The rows of a model: memories held, and the metric over its seeds; from the fewest memories to the most."""
    points = []
    for _, row in runs[runs["model"] == model].groupby("row"):
        held, quality = sample_of_row(row, HELD), sample_of_row(row, metric)
        if held and quality:
            points.append((held.mean, quality))
    return sorted(points, key=lambda point: point[0])


def interpolate(points: Sequence[tuple[float, Sample]], held: float) -> Sample:
    """The quality of a model at a number of memories, between those of its rows."""
    for (low, first), (high, second) in itertools.pairwise(points):
        if low <= held <= high:
            share = (held - low) / (high - low) if high > low else 0.0
            mean = (1 - share) * first.mean + share * second.mean
            variance = (1 - share) ** 2 * first.variance + share**2 * second.variance
            fewer = min(first, second, key=lambda sample: sample.degrees)
            return fewer._replace(mean=mean, variance=variance)
    return points[0][1] if held < points[0][0] else points[-1][1]


def with_less_memory(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a model is as good as the best row of another, within a margin, with fewer memories.

    The other's memory is the least with which it is as good as its own best row, by the means. A row of the first must
    hold less, and the interval of its difference to that best row must lie within the margin.
    """
    text = f"{one} as good as {other} with less memory"
    rows, others = curve(runs, metric, one), curve(runs, metric, other)
    if not rows or not others:
        return Finding(text, NOT_RUN)
    sign = -1 if lower_is_better(metric) else 1
    best = max((quality for _, quality in others), key=lambda quality: sign * quality.mean)
    least = min(held for held, quality in others if sign * (best.mean - quality.mean) <= margin)
    smaller = [(held, quality) for held, quality in rows if held < least]
    if not smaller:
        return Finding(f"{text}: no row of {one} holds less than {format_number(least, 3)}", NOT_SHOWN)
    findings = [
        compare(f"{format_number(held, 3)} held against {format_number(least, 3)}", metric, quality, best, -margin)
        for held, quality in smaller
    ]
    counting = [finding for finding in findings if finding.verdict == SHOWN][:1] or findings
    return Finding(f"{text}: {'; '.join(finding.text for finding in counting)}", combine(counting))


def more_for(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a metric of a kind of token, such as its span, is larger than that of another kind in the same runs.

    The interval is that of the mean difference within a run: how long spans are in all differs between seeds.
    """
    text = f"{metric} of {one} larger than of {other}"
    kinds = runs.reindex(columns=[f"{metric}/{kind}" for kind in (one, other)])
    difference = sample(kinds.iloc[:, 0] - kinds.iloc[:, 1], planned_seeds(runs))
    if difference is None:
        return Finding(text, NOT_RUN)
    finding = compare("", metric, difference, difference._replace(mean=0.0, variance=0.0, degrees=math.inf), margin)
    numbers = " against ".join(map(format_number, kinds.dropna().mean()))
    interval = finding.text.partition(", ")[2].replace("better", "more").replace(f"{difference} and ", "")
    return Finding(f"{text}: {numbers}, {interval}", finding.verdict)


Check = Callable[[pd.DataFrame, str, str, str, float], Finding]
CHECKS: Mapping[str, Check] = {
    "better": better,
    "no_better": no_better,
    "at_equal_memory": at_equal_memory,
    "with_less_memory": with_less_memory,
    "more_for": more_for,
}


def row_verdicts(folder: Path) -> list[dict[str, str]]:
    """Each row that has a number of the paper: it beside ours, and whether ours confirms it.

    At the paper's size, ours is compared with that number. At a smaller one, and of times and bytes, which depend on
    the machine, what is compared is the order: whether the row is better than each row that it beats in the paper's
    table, and worse than the others.
    """
    verdicts = []
    for name in table_names():
        table = read_table(name, "paper")
        size, runs = table_runs(folder, name)
        runs, mixed = rows_of_one_setting(runs)
        for row in table.rows:
            for metric, number in row.paper.items():
                if metric not in table.metrics:
                    continue
                ours = measured(metric, runs[runs["row"] == row.title])
                rivals = {other.title: other.paper[metric] for other in table.rows if metric in other.paper}
                verdict = order_verdict(runs, metric, row.title, rivals)
                if row.title in mixed:
                    verdict = "runs of several settings"
                elif size.startswith("paper") and len(ours) and not metric.startswith("perf/"):
                    verdict = number_verdict(metric, ours, number)
                verdicts.append({
                    "table": name,
                    "row": row.title,
                    "metric": head(metric),
                    "the paper": format_number(float(scaled(metric, number))),
                    "ours": format_seeds(scaled(metric, ours)) if len(ours) else "",
                    "seeds": str(len(ours)) if len(ours) else "",
                    "size": size,
                    "verdict": verdict,
                })  # fmt: skip
    return verdicts


def order_verdict(runs: pd.DataFrame, metric: str, title: str, numbers: Mapping[str, float]) -> str:
    """Whether a row stands to the others of its table as in the paper."""
    sign = -1 if lower_is_better(metric) else 1
    findings = []
    for other, number in numbers.items():
        if number != numbers[title]:
            pair = (title, other) if sign * numbers[title] > sign * number else (other, title)
            findings.append(better(runs, metric, *pair, 0))
    if not len(measured(metric, runs[runs["row"] == title])):
        return NOT_RUN
    compared = [finding for finding in findings if finding.verdict != NOT_RUN]
    if not compared:
        return "no row to compare it with"
    shown = sum(finding.verdict == SHOWN for finding in compared)
    against = sum(finding.verdict == CONTRADICTED for finding in compared)
    return f"order shown against {shown} of {len(compared)}" + (f", contradicted by {against}" if against else "")


def number_verdict(metric: str, values: pd.Series, number: float) -> str:
    """Whether the seeds' interval includes the paper's number, or is better than it."""
    ours = cast(Sample, sample(values))
    paper = ours._replace(mean=number, variance=0.0, degrees=math.inf)
    finding = compare("", metric, ours, paper)
    if finding.verdict != NOT_SHOWN or ours.seeds == 1:
        return finding.verdict
    return f"{SHOWN}, within ± {format_number(float(scaled(metric, half_width(ours, paper))), 2)}"
