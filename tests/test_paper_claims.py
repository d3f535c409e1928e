"""The paper's claims are judged from the written tables, by intervals over seeds."""

from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy.stats import ttest_ind

from expire_span.paper_claims import (
    at_equal_memory,
    better,
    check,
    interpolate,
    judge,
    no_better,
    order_verdict,
    overall,
    row_verdicts,
    table_runs,
    with_less_memory,
)
from expire_span.paper_statistics import CONTRADICTED, NOT_RUN, NOT_SHOWN, SHOWN, sample
from expire_span.paper_tables import read_table

ERROR, ACCURACY = "test/error", "test/accuracy"
CLAIMS = OmegaConf.to_container(OmegaConf.create((files("expire_span.conf") / "claims.yaml").read_text()))


def table(metric, **rows):
    """Rows of a table, by title: the seeds' values."""
    frames = [pd.DataFrame({"row": title, "model": title, metric: values}) for title, values in rows.items()]
    return pd.concat(frames, ignore_index=True)


def curves(metric, **models):
    """Curves by model: for each number of memories held, the seeds' values."""
    frames = [
        pd.DataFrame({"row": f"{model} {held}", "model": model, "test/memory/held": held, metric: values})
        for model, points in models.items()
        for held, values in points.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_the_interval_of_a_difference_is_welchs():
    generator = np.random.default_rng(0)
    one, other = generator.normal(0.3, 0.1, 5), generator.normal(0.5, 0.02, 3)
    interval = ttest_ind(other, one, equal_var=False).confidence_interval(0.95)
    text = better(table(ERROR, one=one, other=other), ERROR, "one", "other", 0).text
    low, high = (float(number) / 100 for number in text.split("better by ")[1].split(" (")[0].split(" to "))
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=0.01)


@pytest.mark.parametrize(
    ("metric", "one", "other", "verdict"),
    [
        (ERROR, [0.1, 0.11, 0.12], [0.5, 0.51, 0.52], SHOWN),
        (ERROR, [0.5, 0.51, 0.52], [0.1, 0.11, 0.12], CONTRADICTED),
        (ACCURACY, [0.5, 0.51, 0.52], [0.1, 0.11, 0.12], SHOWN),
        ("perf/ms_per_batch", [10.0, 11.0], [90.0, 91.0], SHOWN),
        (ERROR, [0.1, 0.5, 0.9], [0.2, 0.5, 0.95], NOT_SHOWN),
        (ERROR, [0.1], [0.5, 0.51, 0.52], NOT_SHOWN),  # of one seed nothing is known
        (ERROR, [], [0.5, 0.51], NOT_RUN),
        (ACCURACY, [1.0, 1.0, 1.0], [0.9, 0.9, 0.9], SHOWN),  # no spread at all
    ],
)
def test_better_is_shown_where_the_interval_lies_on_one_side(metric, one, other, verdict):
    runs = table(metric, one=one, other=other)
    assert better(runs, metric, "one", "other", 0).verdict == verdict
    opposite = {SHOWN: CONTRADICTED, CONTRADICTED: SHOWN}.get(verdict, verdict)
    assert no_better(runs, metric, "one", "other", 0).verdict == opposite


def test_a_margin_must_be_exceeded():
    runs = table(ACCURACY, one=[0.9, 0.91, 0.92], other=[0.8, 0.81, 0.82])
    assert better(runs, ACCURACY, "one", "other", 0.05).verdict == SHOWN
    assert better(runs, ACCURACY, "one", "other", 0.099).verdict == NOT_SHOWN


def test_between_two_rows_the_quality_lies_on_a_straight_line():
    points = [(10.0, sample(pd.Series([0.2, 0.4]))), (30.0, sample(pd.Series([0.6, 0.8])))]
    middle = interpolate(points, 15.0)
    assert middle.mean == pytest.approx(0.75 * 0.3 + 0.25 * 0.7)
    assert middle.variance == pytest.approx(0.75**2 * 0.01 + 0.25**2 * 0.01)
    assert interpolate(points, 5.0) == points[0][1]
    assert interpolate(points, 30.0).mean == pytest.approx(0.7)


def test_models_are_compared_where_they_hold_as_many_memories():
    ours = {10: [0.9, 0.91, 0.9], 50: [0.95, 0.96, 0.95]}
    theirs = {8: [0.3, 0.31, 0.3], 40: [0.6, 0.61, 0.6]}
    runs = curves(ACCURACY, expire_span=ours, trans_xl=theirs)
    finding = at_equal_memory(runs, ACCURACY, "expire_span", "trans_xl", 0)
    assert finding.verdict == SHOWN
    assert "10 held" in finding.text
    assert "50 held" not in finding.text  # more than the other ever holds
    assert at_equal_memory(runs, ACCURACY, "trans_xl", "expire_span", 0).verdict == CONTRADICTED
    runs = curves(ACCURACY, expire_span={10: [0.9, 0.91], 20: [0.2, 0.21]}, trans_xl=theirs)
    assert at_equal_memory(runs, ACCURACY, "expire_span", "trans_xl", 0).verdict == NOT_SHOWN  # better at one of two
    assert at_equal_memory(runs, ACCURACY, "expire_span", "compressive", 0).verdict == NOT_RUN


def test_rows_that_hold_the_same_have_no_line_between_them():
    points = [(10.0, sample(pd.Series([0.2, 0.4]))), (10.0, sample(pd.Series([0.6, 0.8])))]
    assert interpolate(points, 10.0).mean == pytest.approx(0.3)
    runs = curves(ACCURACY, expire_span={50: [0.9, 0.91]}, trans_xl={10: [0.5, 0.51]})
    finding = at_equal_memory(runs, ACCURACY, "expire_span", "trans_xl", 0)
    assert finding.verdict == NOT_RUN
    assert "each row of expire_span holds more than every row of trans_xl" in finding.text


def test_less_memory_counts_only_where_it_is_surely_as_good():
    """As good: the interval of the difference lies within the margin; not only the mean, as of one lucky seed."""
    theirs = {10: [0.3, 0.3], 100: [0.94, 0.94, 0.94], 200: [0.95, 0.95, 0.95]}
    runs = curves(ACCURACY, expire_span={20: [0.6, 0.98], 90: [0.97, 0.97, 0.96]}, trans_xl=theirs)
    finding = with_less_memory(runs, ACCURACY, "expire_span", "trans_xl", 0.02)
    assert finding.verdict == SHOWN
    assert "90 held against 100" in finding.text
    assert "90 held against 200" in with_less_memory(runs, ACCURACY, "expire_span", "trans_xl", 0).text
    for ours in ({20: [0.94]}, {20: [0.6, 1.0, 1.0]}):  # one seed, and an interval wider than the margin
        runs = curves(ACCURACY, expire_span=ours, trans_xl=theirs)
        assert with_less_memory(runs, ACCURACY, "expire_span", "trans_xl", 0.02).verdict == NOT_SHOWN
    runs = curves(ERROR, expire_span={20: [0.5, 0.51]}, trans_xl={100: [0.1, 0.1]})
    assert with_less_memory(runs, ERROR, "expire_span", "trans_xl", 0.02).verdict == CONTRADICTED
    runs = curves(ERROR, expire_span={120: [0.1, 0.1]}, trans_xl={100: [0.1, 0.1]})
    finding = with_less_memory(runs, ERROR, "expire_span", "trans_xl", 0.02)
    assert finding.verdict == NOT_SHOWN
    assert "no row of expire_span holds less than 100" in finding.text


def test_that_no_difference_is_seen_does_not_show_that_there_is_none():
    runs = table(ERROR, one=[0.1, 0.5, 0.9], other=[0.2, 0.5, 0.95], lucky=[0.5])
    assert no_better(runs, ERROR, "one", "other", 0.02).verdict == NOT_SHOWN
    assert no_better(runs, ERROR, "lucky", "other", 0.02).verdict == NOT_SHOWN
    runs = table(ERROR, one=[0.1, 0.101, 0.102], other=[0.1, 0.102, 0.101], worse=[0.2, 0.201, 0.202])
    assert no_better(runs, ERROR, "one", "other", 0.02).verdict == SHOWN
    assert no_better(runs, ERROR, "worse", "one", 0).verdict == SHOWN
    assert no_better(runs, ERROR, "one", "worse", 0.02).verdict == CONTRADICTED


def test_runs_of_different_settings_in_one_row_are_not_averaged(tmp_path):
    row, other = "Expire-Span 128k", "Expire-Span 16k"
    runs = table(ACCURACY, **{row: [0.9, 0.91, 0.2, 0.21], other: [0.1, 0.11]})
    runs["line"] = [1, 1, 2, 2, 1, 1]
    (tmp_path / "mini").mkdir()
    runs.to_csv(tmp_path / "mini/table1.csv")
    finding = check(tmp_path, {"table": "table1", "better": row, "than": other})
    assert finding.verdict == NOT_RUN
    assert f"table1 (mini) without {row}, of which there are runs of several settings: " in finding.text
    verdicts = {verdict["row"]: verdict["verdict"] for verdict in row_verdicts(tmp_path)}
    assert verdicts[row] == "runs of several settings"


def test_a_finding_says_how_many_of_the_planned_seeds_it_has():
    runs = table(ERROR, one=[0.1, 0.11], other=[0.5, 0.51, 0.52]).assign(planned_seeds=3)
    assert "(2 of 3 and 3 seeds)" in better(runs, ERROR, "one", "other", 0).text


def test_a_check_is_by_the_metric_that_was_measured(tmp_path):
    (tmp_path / "paper").mkdir()
    rows = {"Expire-Span": [0.9, 0.91], "loss on the current block": [1.5, 1.51]}
    table("test/bpb", **rows).to_csv(tmp_path / "paper/ablations.csv")  # whose minis have an error
    settings = {"table": "ablations", "better": "Expire-Span", "than": "loss on the current block"}
    assert check(tmp_path, settings).verdict == SHOWN


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/table1.csv").write_text("")
    with pytest.raises(ValueError, match=r"table1.csv is damaged \(No columns to parse from file\)"):
        judge(tmp_path)


def test_more_memory_that_did_worse_does_not_weaken_the_other_model():
    theirs = {10: [0.9, 0.91, 0.9], 40: [0.3, 0.31, 0.3]}
    runs = curves(ACCURACY, expire_span={40: [0.6, 0.61, 0.6]}, trans_xl=theirs)
    assert at_equal_memory(runs, ACCURACY, "expire_span", "trans_xl", 0).verdict == CONTRADICTED
    theirs = {10: [0.1, 0.11, 0.1], 40: [0.9, 0.91, 0.9]}
    runs = curves(ERROR, expire_span={40: [0.6, 0.61, 0.6]}, trans_xl=theirs)
    assert at_equal_memory(runs, ERROR, "expire_span", "trans_xl", 0).verdict == CONTRADICTED


def test_the_verdict_of_a_claim_says_what_of_it_was_made():
    assert overall([NOT_RUN, NOT_RUN]) == overall([]) == NOT_RUN
    assert overall([SHOWN, SHOWN]) == SHOWN
    assert overall([SHOWN, NOT_RUN]) == "shown, 1 of 2 not run"
    assert overall([SHOWN, NOT_SHOWN, CONTRADICTED]) == "shown in 1 and contradicted in 1 of 3 checks"


def test_a_row_stands_to_others_as_in_the_paper():
    runs = table(ERROR, a=[0.5, 0.51], b=[0.3, 0.31], c=[0.1, 0.11])
    numbers = {"a": 0.7, "b": 0.4, "c": 0.2, "not run": 0.1}
    assert order_verdict(runs, ERROR, "b", numbers) == "order shown against 2 of 2"
    numbers = {"a": 0.2, "b": 0.4, "c": 0.1}
    assert order_verdict(runs, ERROR, "b", numbers) == "order shown against 1 of 2, contradicted by 1"
    assert order_verdict(runs, ERROR, "not run", numbers | {"not run": 0.1}) == NOT_RUN


@pytest.mark.parametrize(
    ("newlines", "verdict"),
    [
        ([22.0, 53.0, 12.0], SHOWN),  # by about the same in each run, though the runs differ by more
        ([19.0, 48.0, 7.0], CONTRADICTED),
        ([21.0, 49.0, 9.0], NOT_SHOWN),
        ([40.0], NOT_SHOWN),  # of one seed nothing is known
        (None, NOT_RUN),  # as in a table of before the spans of each kind were written
    ],
)
def test_what_is_kept_of_a_text_is_judged_by_the_mean_spans_within_a_run(newlines, verdict, tmp_path):
    runs = table("test/bpb", **{"Expire-Span": [2.4] * len(newlines or [1])})
    if newlines is not None:
        runs = runs.assign(**{"span/newlines": newlines, "span/frequent words": [20.0, 50.0, 9.0][: len(newlines)]})
    (tmp_path / "mini").mkdir()
    runs.to_csv(tmp_path / "mini/figure12.csv", index=False)
    checks = [settings for claim in CLAIMS for settings in claim["checks"] if settings.get("more_for") == "newlines"]
    [finding] = [check(tmp_path, settings) for settings in checks]
    assert finding.verdict == verdict
    assert finding.text.startswith("figure12 (mini): span of newlines larger than of frequent words")
    if verdict == SHOWN:
        assert ": 29 against 26.33, more by 1.23 to 4.1 (3 seeds)" in finding.text


def test_every_claim_has_a_check():
    assert all(claim["checks"] for claim in CLAIMS)


@pytest.mark.parametrize("number", range(len(CLAIMS)))
def test_every_check_of_a_claim_names_rows_and_models_that_its_table_has(number, tmp_path):
    for settings in CLAIMS[number]["checks"]:
        assert check(tmp_path, settings).verdict == NOT_RUN  # of a kind that there is, for a table that there is
        tables = [read_table(settings["table"], size) for size in ("mini", "paper")]
        if "more_for" in settings:
            assert all(len(one.rows) == 1 and one.page is not None for one in tables)
        titles = {row.title for one in tables for row in one.rows}
        if "better" in settings or "no_better" in settings:
            assert {settings.get("better") or settings["no_better"], settings["than"]} <= titles


def test_the_page_has_every_claim_and_the_better_protocol_counts(tmp_path):
    row = "Expire-Span 128k"
    for folder, value in (("mini", 0.2), ("mini/tuned", 0.9)):
        (tmp_path / folder).mkdir(parents=True)
        table(ACCURACY, **{row: [value] * 3, "Expire-Span 16k": [0.3] * 3}).to_csv(tmp_path / folder / "table1.csv")
    assert table_runs(tmp_path, "table1")[0] == "mini, tuned"
    (tmp_path / "paper").mkdir()
    partly = table(ACCURACY, **{row: [0.1]}).assign(planned_seeds=3)
    partly.to_csv(tmp_path / "paper/table1.csv")
    assert table_runs(tmp_path, "table1")[0] == "mini, tuned"  # a table that is still being made outranks none
    page = judge(tmp_path)
    assert all(claim["claim"] in page for claim in CLAIMS)
    assert f"table1 (mini, tuned): {row} better than Expire-Span 16k (test/accuracy, %): 90 against 30" in page
    assert "shown, 2 of 3 not run, at small size" in page
    [verdict] = [verdict for verdict in row_verdicts(tmp_path) if verdict["row"] == row]
    assert (verdict["ours"], verdict["the paper"], verdict["size"]) == ("90 ± 0", "52.1", "mini, tuned")


def test_at_the_papers_size_a_row_is_compared_with_its_number(tmp_path):
    (tmp_path / "paper").mkdir()
    rows = {"Expire-Span 128k": [0.5, 0.55, 0.52], "Expire-Span 16k": [0.2, 0.21, 0.2]}
    table(ACCURACY, **rows).to_csv(tmp_path / "paper/table1.csv")
    of_table = [verdict for verdict in row_verdicts(tmp_path) if verdict["table"] == "table1"]
    verdicts = {verdict["row"]: verdict["verdict"] for verdict in of_table}
    assert verdicts["Expire-Span 128k"] == "shown, within ± 6.3"  # 52.1 lies within the interval
    assert verdicts["Expire-Span 16k"] == CONTRADICTED  # 29.4 does not
    assert verdicts["Transformer-XL 2k"] == NOT_RUN
