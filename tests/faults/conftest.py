"""Prints at the end of `make test-faults` what was done to runs, and how they came out of it."""

from collections import Counter

import pytest

PROPERTY = "faults"  # in which a test reports a kind of fault and the outcomes of its cases


def pytest_terminal_summary(terminalreporter):
    totals: dict[str, Counter] = {}
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, (kind, counts) in report.user_properties:
            if name == PROPERTY:
                totals.setdefault(kind, Counter()).update(counts)
    if totals:
        terminalreporter.section("faults")
    for kind, counts in totals.items():
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
        terminalreporter.write_line(f"{kind}: {sum(counts.values())} cases: {outcomes}")


@pytest.fixture
def count(record_property):
    """Counts the outcomes of a kind of fault, for the summary."""
    counts: dict[str, dict[str, int]] = {}

    def add(kind, outcome):
        if kind not in counts:
            counts[kind] = {}
            record_property(PROPERTY, (kind, counts[kind]))  # before the test ends, when the report is made
        counts[kind][outcome] = counts[kind].get(outcome, 0) + 1

    return add
