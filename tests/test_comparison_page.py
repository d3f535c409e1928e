import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from run_folders import run_folder

from expire_span.comparison_page import MAX_POINTS, comparison_page, page_data
from expire_span.results import load_runs
from expire_span.runner.commands.report import main, markdown_report

HOSTILE = (
    "</script><script>document.title = 'broken'</script><!-- <script> {{PLOTLY}} \u2028 & <img src=x onerror=alert(1)>"
)


class Page(html.parser.HTMLParser):
    """The elements of a page, with their attributes and texts, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")

    def handle_data(self, text):
        if self.texts:
            self.texts[-1] += text

    def scripts(self):
        return [text for (tag, _), text in zip(self.elements, self.texts, strict=True) if tag == "script"]


def data_of(text):
    return json.loads(Page(text).scripts()[0])


def write_metrics(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_rows(runs):
    """Cells of the table that the command prints, by header."""
    lines = [line.strip("| ").split("|") for line in markdown_report(runs).splitlines()]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two models, of one two spans; two seeds each, with curves."""
    root = tmp_path_factory.mktemp("runs")
    for model, span in (("expire_span", 256), ("trans_xl", 64), ("trans_xl", 128)):
        for seed in (1, 2):
            metrics = {"test/accuracy": 0.5 + span / 1000 + seed / 100, "test/memory/held": span / seed}
            config = {"model.max_span": span}
            folder = run_folder(root / f"{model}{span}" / f"seed{seed}", seed, "copy", model, metrics, config)
            rows = [{"update": update, "train/loss": seed / update} for update in range(20, 401, 20)]
            write_metrics(folder, [*rows, {"update": 400, "train/loss": 7.0, "valid/accuracy": seed / 3}])
    return root


def test_the_page_holds_the_final_metrics_of_every_run(runs_folder):
    shown = {run["folder"]: run for run in data_of(comparison_page(load_runs(runs_folder)))["runs"]}
    paths = list(runs_folder.glob("*/*/summary.json"))
    assert len(shown) == len(paths) == 6
    for path in paths:
        summary, run = json.loads(path.read_text()), shown[str(path.parent)]
        costs = {name.removeprefix("test/"): value for name, value in summary["metrics"].items() if "memory" in name}
        assert run["metrics"] == summary["metrics"] | costs
        assert run["seed"] == summary["protocol"]["seed"]


def test_a_curve_has_every_value_of_its_metric_and_of_two_for_an_update_the_first(runs_folder):
    for run in page_data(load_runs(runs_folder))["runs"]:
        place, losses = run["curves"]["train/loss"]
        assert run["axes"][place]["update"] == list(range(20, 401, 20))
        assert losses == pytest.approx([run["seed"] / update for update in range(20, 401, 20)], rel=1e-5)
        place, accuracies = run["curves"]["valid/accuracy"]
        assert run["axes"][place]["update"] == [400]
        assert accuracies == pytest.approx([run["seed"] / 3], rel=1e-5)


def test_the_groups_are_the_rows_of_the_report(runs_folder):
    runs = load_runs(runs_folder)
    data, rows = page_data(runs), report_rows(runs)
    assert data["settings"] == ["model.max_span", "protocol.updates"]
    for place, (group, row) in enumerate(zip(data["groups"], rows, strict=True)):
        assert (group["task"], group["model"]) == (row["task"], row["model"])
        assert str(group["settings"]["model.max_span"]) == row["model.max_span"]
        assert sum(run["group"] == place for run in data["runs"]) == int(row["seeds"])


def test_the_page_names_a_run_that_was_far_behind_its_recipe(tmp_path):
    run_folder(tmp_path / "good")
    run_folder(tmp_path / "bad", model="trans_xl", far_behind=["train/accuracy is 0.2 at update 56 ..."])
    notes = {group["model"]: group["notes"] for group in data_of(comparison_page(load_runs(tmp_path)))["groups"]}
    behind = f"{tmp_path}/bad was far behind its recipe: train/accuracy is 0.2 at update 56 ..."
    assert notes == {"expire_span": [], "trans_xl": [behind]}


def test_a_long_curve_is_thinned_between_its_first_and_last_point(tmp_path):
    values = [math.nan, *range(1, 5000), math.nan]
    write_metrics(run_folder(tmp_path / "run"), [{"update": i, "train/loss": value} for i, value in enumerate(values)])
    [run] = page_data(load_runs(tmp_path))["runs"]
    place, losses = run["curves"]["train/loss"]
    assert run["axes"][place]["update"] == losses  # a point is still that of its update
    assert (losses[0], losses[-1], len(losses)) == (1, 4999, MAX_POINTS)
    assert max(b - a for a, b in itertools.pairwise(losses)) <= math.ceil(5000 / (MAX_POINTS - 1))


def test_hours_of_training_follow_from_the_logged_speed(tmp_path):
    folder = run_folder(tmp_path / "run", config={"train.updates": 30}, protocol={"tokens": 30 * 3600})
    rows = [(10, 5.0, 36_000), (20, 4.0, 18_000), (20, 3.0, 1), (30, 2.0, 18_000)]  # 3600 tokens an update
    write_metrics(folder, [{"update": u, "train/loss": x, "perf/tokens_per_second": s} for u, x, s in rows])
    [run] = page_data(load_runs(tmp_path))["runs"]
    assert run["tokens_per_update"] == 3600
    assert run["axes"] == [{"update": [10, 20, 30], "hours": pytest.approx([1 / 3600, 3 / 3600, 5 / 3600], rel=1e-5)}]


def write_hostile_runs(root):
    for number, text in enumerate((HOSTILE, "plain")):
        folder = run_folder(
            root / f"{number}<!--<script>", model=f"m{text}", config={"task.path": text}, simplifications=[text]
        )
        write_metrics(folder, [{"update": update, f"train/{text}": 1.0, "__proto__/x": 1.0} for update in (1, 2)])
    run_folder(root / "stopped<img src=x>", model=HOSTILE, finished=False)


def test_no_text_of_a_run_can_break_out_of_the_data(tmp_path):
    write_hostile_runs(tmp_path)
    page = comparison_page(load_runs(tmp_path))
    parsed = Page(page)
    assert len(parsed.scripts()) == 3
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    assert page.count("\u2028") == parsed.scripts()[1].count("\u2028")  # only those of plotly.js, if any
    data = data_of(page)
    assert f"m{HOSTILE}" in [group["model"] for group in data["groups"]]
    assert HOSTILE in [group["settings"]["task.path"] for group in data["groups"]]
    assert f"train/{HOSTILE}" in [name for run in data["runs"] for name in run["curves"]]


def test_the_page_refers_to_no_other_file(runs_folder):
    attributes = [
        name for _, attributes in Page(comparison_page(load_runs(runs_folder))).elements for name in attributes
    ]
    assert not {"src", "href"} & set(attributes)


def test_missing_and_infinite_values_are_json_that_a_browser_reads(tmp_path):
    path = run_folder(tmp_path / "a", config={"task.limit": "?"}, metrics={"test/accuracy": math.nan}) / "summary.json"
    path.write_text(path.read_text().replace('"?"', "Infinity"))
    run_folder(tmp_path / "b", config={"task.limit": None}, protocol={"tokens": None})
    data = json.loads(json.dumps(page_data(load_runs(tmp_path)), allow_nan=False))
    assert sorted(str(group["settings"]["task.limit"]) for group in data["groups"]) == ["None", "inf"]
    assert sorted("test/accuracy" in run["metrics"] for run in data["runs"]) == [False, True]
    assert sum(run["tokens_per_update"] is None for run in data["runs"]) == 1


def test_runs_without_a_place_or_without_readable_curves_are_listed_with_the_reason(tmp_path):
    run_folder(tmp_path / "good")
    run_folder(tmp_path / "stopped", finished=False)
    run_folder(tmp_path / "old", seed=2, started="2026-01-01T00:00:00+00:00")
    run_folder(tmp_path / "new", seed=2, started="2026-02-01T00:00:00+00:00")
    (run_folder(tmp_path / "cut", seed=3) / "metrics.jsonl").write_text('nonsense\n{"update": 1}\n')
    data = page_data(load_runs(tmp_path))
    problems = {problem["folder"].removeprefix(f"{tmp_path}/"): problem["problem"] for problem in data["problems"]}
    assert problems.keys() == {"stopped", "old", "cut"}
    assert problems["stopped"].startswith("unfinished")
    assert problems["old"].startswith("the same settings and seed as")
    assert problems["cut"].startswith("no learning curves: ")
    assert len(data["runs"]) == 3  # without curves a run still has its final metrics


def test_without_a_finished_run_the_page_lists_the_problems(tmp_path):
    (tmp_path / "killed/.hydra").mkdir(parents=True)
    data = data_of(comparison_page(load_runs(tmp_path)))
    assert (data["runs"], data["groups"], len(data["problems"])) == ([], [], 1)


def test_the_command_writes_the_page_beside_the_table(runs_folder, tmp_path, capsys):
    main([str(runs_folder), "--html", str(tmp_path / "page.html")])
    assert "| copy" in capsys.readouterr().out
    assert len(data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["runs"]) == 6


def test_a_missing_or_empty_folder_is_refused_in_one_line_and_leaves_no_page(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, reason in (("missing", "is not a folder"), ("empty", "holds no run")):
        with pytest.raises(SystemExit, match=reason) as refused:
            main([str(tmp_path / folder), "--html", str(tmp_path / "page.html")])
        assert "\n" not in refused.value.code
    assert not (tmp_path / "page.html").exists()


def test_without_plotly_one_line_says_what_to_install(runs_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'expire-span[plots]'")):
        main([str(runs_folder), "--html", str(tmp_path / "page.html")])


def browse(page, choices, profile):
    """The document of a page after its scripts have run, without the scripts."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium or Chrome")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}#{choices}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.sub("<script.*?</script>", "", text, flags=re.DOTALL)


@pytest.mark.slow
def test_a_browser_shows_the_table_of_the_report_for_the_runs_that_the_address_selects(runs_folder, tmp_path):
    runs = load_runs(runs_folder)
    page = tmp_path / "page.html"
    page.write_text(comparison_page(runs), encoding="utf-8")
    for choices, selected in (
        ("", runs),
        ("model=trans_xl&seed=2", runs[(runs.model == "trans_xl") & (runs.seed == 2)]),
    ):
        document = browse(page, choices, tmp_path / "profile")
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", document)]
        header, *shown = [[re.sub("<.*?>|\u200b", "", cell) for cell in row] for row in rows]
        columns = ["model", "model.max_span", "seeds", "test/accuracy", "memory/held"]
        expected = [[row[name] for name in columns] for row in report_rows(selected)]
        assert [[row[header.index(name)] for name in columns] for row in shown] == expected
        assert len(re.findall('class="point"', document)) == len(selected) + len(expected)


@pytest.mark.slow
def test_a_browser_shows_every_text_of_a_run_as_text(tmp_path):
    write_hostile_runs(tmp_path / "runs")
    page = tmp_path / "page.html"
    page.write_text(comparison_page(load_runs(tmp_path)), encoding="utf-8")
    document = browse(page, "", tmp_path / "profile")
    assert "<title>Comparison of runs</title>" in document
    assert "Share" not in document  # plotly's button that sends the data to its cloud
    assert "<img" not in document
    assert re.search("<td.*m&lt;/script&gt;", document)
