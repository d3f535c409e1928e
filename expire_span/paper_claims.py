"""The paper's claims, judged from the tables that `expire-span-paper` has written.

conf/claims.yaml has each claim with its checks, of one table each:

    {table: table1, better: Expire-Span 128k, than: Transformer-XL 2k}      two rows, by their titles
    {table: figure6, no_better: Expire-Span 32k, than: Expire-Span 16k}     the second is not beaten by the first
    {table: figure7, at_equal_memory: expire_span, than: trans_xl}          two curves, by their models
    {table: figure5, with_less_memory: expire_span, than: trans_xl, margin: 0.05}

The metric is the table's first one unless a check names another. Differences are of means over seeds, with Welch's 95 %
interval: shown means that it lies wholly on the claimed side of 0, contradicted that it lies wholly on the other.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pandas as pd
from omegaconf import OmegaConf

from expire_span.tasks.base import LOWER_IS_BETTER

from .paper_tables import CONF, SIZES, head, measured, read_table, scaled, table_names
from .runner.commands.report import format_number, format_seeds

SHOWN, NOT_SHOWN, CONTRADICTED, NOT_RUN = "shown", "not shown", "contradicted", "not run"
LEVEL = 0.95
HELD = "memory/held"


class Finding(NamedTuple):
    """What one check found."""

    text: str
    verdict: str


class Sample(NamedTuple):
    """A mean over seeds and its uncertainty."""

    mean: float
    variance: float  # of the mean
    degrees: float  # of freedom; 0: one seed
    seeds: int


def table_runs(folder: Path, name: str) -> tuple[str, pd.DataFrame]:
    """The runs of a table that was written below a folder, a line each, and at what size; none, if it was not.

    Of a table that was made several times counts the first of: the paper's size tuned, the paper's size, the mini
    tuned, the mini.
    """
    for size in reversed(SIZES):
        for subfolder in ("tuned", ""):
            path = folder / size / subfolder / f"{name}.csv"
            if path.is_file() and "model" in (runs := pd.read_csv(path)):
                return f"{size}{', tuned' if subfolder else ''}", runs[runs["model"].notna()]
    return "", pd.DataFrame({"row": [], "model": []})


def judge(folder: Path) -> str:
    """Judge all claims, and every row that has a number of the paper, from the tables below a folder; in Markdown."""
    content: Any = OmegaConf.to_container(OmegaConf.create((CONF / "claims.yaml").read_text()))
    verdicts, details = [], []
    for number, claim in enumerate(content, 1):
        findings = [check(folder, settings) for settings in claim["checks"]]
        tables = dict.fromkeys(settings["table"] for settings in claim["checks"])
        sizes = [size for name in tables if (size := table_runs(folder, name)[0])]
        verdict = overall([finding.verdict for finding in findings])
        if SHOWN in verdict and not any(size.startswith("paper") for size in sizes):
            verdict += ", at small size"
        verdicts.append({"": number, "claim": claim["claim"], "the paper": claim["paper"], "verdict": verdict})
        lines = [f"- {finding.text}: {finding.verdict}." for finding in findings]
        lines += [f"- {note}" for note in claim.get("notes", [])]
        command = f" `expire-span-paper {' '.join(tables)} size=mini --tune`" if tables else ""
        heading = f"## {number}. {claim['claim']}\n\nThe paper: {claim['paper']}.{command}"
        details.append("\n".join([heading, "", *lines]))
    parts = [
        "# The paper's claims",
        "`expire-span-paper claims`",
        "Means over seeds, with 95 % intervals of their differences (Welch). Shown: the interval lies on the side that "
        "the claim says. Contradicted: on the other. Not shown: it includes 0. At small size: with simpler tasks and "
        "smaller models (minis).",
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
    made = [verdict for verdict in verdicts if verdict != NOT_RUN]
    if not made:
        return NOT_RUN
    counts = [f"{verdict} in {made.count(verdict)}" for verdict in (SHOWN, CONTRADICTED) if verdict in made]
    text = made[0] if len(set(made)) == 1 else f"{' and '.join(counts)} of {len(made)} checks"
    missing = len(verdicts) - len(made)
    return f"{text}, {missing} of {len(verdicts)} not run" if missing else text


def check(folder: Path, settings: Mapping[str, Any]) -> Finding:
    """Make one check. Raises ValueError if it is of no kind that there is."""
    table = read_table(settings["table"], "mini")
    metric = settings.get("metric", table.metrics[0])
    size, runs = table_runs(folder, table.name)
    for kind, function in CHECKS.items():
        if kind in settings:
            finding = function(runs, metric, settings[kind], settings["than"], float(settings.get("margin", 0)))
            where = f"{table.name}{f' ({size})' if size else ''}"
            return finding._replace(text=f"{where}: {finding.text}")
    raise ValueError(f"conf/claims.yaml: a check has one of {', '.join(CHECKS)}, not {', '.join(settings)}")


def better(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a row is better than another by more than a margin."""
    text = f"{one} better than {other} ({head(metric)})"
    ours, theirs = (sample(measured(metric, runs[runs["row"] == title])) for title in (one, other))
    return compare(text, metric, ours, theirs, margin)


def no_better(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a row is no better than another, within a margin: the opposite is not shown."""
    finding = better(runs, metric, one, other, margin)
    verdict = {SHOWN: CONTRADICTED, NOT_RUN: NOT_RUN}.get(finding.verdict, SHOWN)
    return Finding(finding.text.replace("better than", "no better than", 1), verdict)


def compare(text: str, metric: str, one: Sample | None, other: Sample | None, margin: float = 0) -> Finding:
    """Whether the mean of one sample is better than that of the other, by more than a margin."""
    if one is None or other is None:
        return Finding(text, NOT_RUN)
    sign = -1 if lower_is_better(metric) else 1
    difference, error = sign * (one.mean - other.mean), math.sqrt(one.variance + other.variance)
    numbers = " against ".join(format_number(float(scaled(metric, sample.mean))) for sample in (one, other))
    if not (one.degrees and other.degrees):
        return Finding(f"{text}: {numbers}, one seed", NOT_SHOWN)
    half = half_width(one, other) if error else 0.0
    low, high = difference - half, difference + half
    verdict = SHOWN if low > margin else CONTRADICTED if high < margin else NOT_SHOWN
    interval = f"{format_number(float(scaled(metric, low)), 3)} to {format_number(float(scaled(metric, high)), 3)}"
    return Finding(f"{text}: {numbers}, better by {interval} ({one.seeds} and {other.seeds} seeds)", verdict)


def half_width(one: Sample, other: Sample) -> float:
    """Half of the interval of a difference of two means (Welch)."""
    from scipy.stats import t

    total = one.variance + other.variance
    degrees = total**2 / (one.variance**2 / one.degrees + other.variance**2 / other.degrees)
    return float(t.ppf((1 + LEVEL) / 2, degrees)) * math.sqrt(total)


def sample(values: pd.Series) -> Sample | None:
    """The mean of the seeds; None if there is none."""
    values = values.dropna()
    if values.empty:
        return None
    variance = float(values.var()) / len(values) if len(values) > 1 else 0.0
    return Sample(float(values.mean()), variance, len(values) - 1, len(values))


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better: errors, losses, and all costs."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER or metric.startswith(("perf/", "memory/"))


def at_equal_memory(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a model is better than another where both hold as many memories.

    The other's quality lies on straight lines between its rows. Of a row of the first that holds less than the other's
    least, the other's least counts, and none that holds more than the other's most.
    """
    text = f"{one} better than {other} at equal memory"
    rows, others = curve(runs, metric, one), curve(runs, metric, other)
    if not rows or not others:
        return Finding(text, NOT_RUN)
    rows = [(held, sample) for held, sample in rows if held <= others[-1][0]]
    findings = [
        compare(f"{format_number(held, 3)} held", metric, sample, interpolate(others, held), margin)
        for held, sample in rows
    ]
    return Finding(f"{text}: {'; '.join(finding.text for finding in findings)}", combine(findings))


def combine(findings: Sequence[Finding]) -> str:
    """The verdict of a check of several points: of all, or not shown."""
    verdicts = {finding.verdict for finding in findings}
    return verdicts.pop() if len(verdicts) == 1 else NOT_SHOWN


def curve(runs: pd.DataFrame, metric: str, model: str) -> list[tuple[float, Sample]]:
    """The rows of a model: memories held, and the metric over its seeds; from the fewest memories to the most."""
    points = []
    for _, row in runs[runs["model"] == model].groupby("row"):
        held, quality = sample(measured(HELD, row)), sample(measured(metric, row))
        if held and quality:
            points.append((held.mean, quality))
    return sorted(points, key=lambda point: point[0])


def interpolate(points: Sequence[tuple[float, Sample]], held: float) -> Sample:
    """The quality of a model at a number of memories, between those of its rows."""
    for (low, first), (high, second) in itertools.pairwise(points):
        if low <= held <= high:
            share = (held - low) / (high - low)
            mean = (1 - share) * first.mean + share * second.mean
            variance = (1 - share) ** 2 * first.variance + share**2 * second.variance
            nearer = first if share < 0.5 else second
            return Sample(mean, variance, min(first.degrees, second.degrees), nearer.seeds)
    return points[0][1] if held < points[0][0] else points[-1][1]


def with_less_memory(runs: pd.DataFrame, metric: str, one: str, other: str, margin: float) -> Finding:
    """Whether a model is as good as the best row of another, within a margin, with fewer memories.

    Compared are the rows of each model that hold the fewest memories among those within the margin of that best row.
    """
    text = f"{one} as good as {other} with less memory"
    rows, others = curve(runs, metric, one), curve(runs, metric, other)
    if not rows or not others:
        return Finding(text, NOT_RUN)
    sign = -1 if lower_is_better(metric) else 1
    target = max(sign * quality.mean for _, quality in others) - margin
    reached = [[held for held, quality in points if sign * quality.mean >= target] for points in (rows, others)]
    goal = f"{head(metric)} of {format_number(float(scaled(metric, sign * target)))}"
    if not reached[0]:
        return Finding(f"{text}: no row of {one} reaches {goal}", NOT_SHOWN)
    least, least_other = min(reached[0]), min(reached[1])
    verdict = SHOWN if least < least_other else CONTRADICTED
    return Finding(
        f"{text}: {goal} with {format_number(least, 3)} held against {format_number(least_other, 3)}", verdict
    )


Check = Callable[[pd.DataFrame, str, str, str, float], Finding]
CHECKS: Mapping[str, Check] = {
    "better": better,
    "no_better": no_better,
    "at_equal_memory": at_equal_memory,
    "with_less_memory": with_less_memory,
}


def row_verdicts(folder: Path) -> list[dict[str, str]]:
    """Each row that has a number of the paper: it beside ours, and whether ours confirms it.

    At the paper's size, ours is compared with that number. At a smaller one the numbers differ, and what is compared is
    the order: whether the row is better than each row that it beats in the paper's table, and worse than the others.
    """
    verdicts = []
    for name in table_names():
        table = read_table(name, "paper")
        size, runs = table_runs(folder, name)
        for row in table.rows:
            for metric, number in row.paper.items():
                if metric not in table.metrics:
                    continue
                own = measured(metric, runs[runs["row"] == row.title])
                rivals = {other.title: other.paper[metric] for other in table.rows if metric in other.paper}
                verdict = order_verdict(runs, metric, row.title, rivals)
                if size.startswith("paper") and len(own):
                    verdict = number_verdict(metric, own, number)
                verdicts.append({
                    "table": name,
                    "row": row.title,
                    "metric": head(metric),
                    "the paper": format_number(float(scaled(metric, number))),
                    "ours": format_seeds(scaled(metric, own)) if len(own) else "",
                    "seeds": str(len(own)) if len(own) else "",
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
    made = [finding for finding in findings if finding.verdict != NOT_RUN]
    if not made:
        return "no row to compare it with"
    shown = sum(finding.verdict == SHOWN for finding in made)
    against = sum(finding.verdict == CONTRADICTED for finding in made)
    return f"order shown against {shown} of {len(made)}" + (f", contradicted by {against}" if against else "")


def number_verdict(metric: str, values: pd.Series, number: float) -> str:
    """Whether the seeds' interval includes the paper's number, or is better than it."""
    ours = cast(Sample, sample(values))
    finding = compare("", metric, ours, ours._replace(mean=number, variance=0.0, degrees=math.inf))
    return NOT_SHOWN if ours.seeds == 1 else CONTRADICTED if finding.verdict == CONTRADICTED else SHOWN
