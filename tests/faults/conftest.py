"""Prints at the end of `make test-faults` what was done to runs, and how they came out of it."""

from collections import Counter

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
