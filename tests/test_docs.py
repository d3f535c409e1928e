"""The documentation tells the truth: its paths exist, its tables are complete, its examples run."""

import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from tiny_config import SMALL_SIZES, SMALL_TASKS

from expire_span.runner.commands.plan import make_plan

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w/.-])(?:expire_span|tasks|conf|tests|scripts|docs|examples|results)/[\w./-]*")


@pytest.fixture(scope="module")
def generate():
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_exists(page):
    paths = {path.rstrip(".") for path in PATH.findall(page.read_text())} - {
        "docs/_build",
        "conf/recipe/TASK/SIZE.yaml",
    }
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_the_configuration_page_has_every_key_and_every_option(generate):
    page = generate.config_page()
    for path in [CONF / "config.yaml", *(CONF / "task").glob("*.yaml")]:
        for key, _, _ in generate.keys(path.read_text()):
            assert f"| `{key}` |" in page
    for group in ("task", "model", "size", "hydra/launcher"):
        for path in (CONF / group).glob("*.yaml"):
            assert f"**{path.stem}**: " in page
    for path in (CONF / "recipe").glob("*/*.yaml"):
        assert f"| `{path.parent.name}/{path.stem}` |" in page


def test_the_paper_s_page_has_every_preset_with_the_paper_s_figure(generate):
    rows = {row.split("`")[1]: row for row in generate.experiments_page().splitlines() if row.startswith("| `")}
    assert set(rows) == {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    for row in rows.values():
        assert row.rstrip(" |").rpartition("|")[2].strip()


def test_the_help_fits_one_screen_and_names_every_option():
    text = yaml.safe_load((CONF / "hydra" / "help" / "expire_span.yaml").read_text())
    lines = (text["template"] + text["footer"]).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100
    for group in ("task", "model", "size", "hydra/launcher"):
        for path in (CONF / group).glob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", text["template"])


def test_the_plan_that_a_page_shows_is_what_the_command_prints():
    shown = re.findall(
        r"```console\n\$ expire-span-plan (.*?)\n(.*?)\n```", (ROOT / "docs/scaling.md").read_text(), re.S
    )
    assert shown
    for arguments, output in shown:
        assert str(make_plan(arguments.split())) == output


def run_the_example(page, folder, *overrides):
    """Write the files that a page shows, each headed by its path, and train on them."""
    for code in re.findall(
        r"```(?:python|yaml)\n(# \S+\.(?:py|yaml)\n.*?)```", (ROOT / "docs" / page).read_text(), re.S
    ):
        path = folder / code.split()[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    command = [
        sys.executable,
        "-m",
        "expire_span",
        "--config-dir",
        "mine",
        *overrides,
        *SMALL_SIZES,
        "hydra.run.dir=run",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_task_of_the_docs_trains(tmp_path):
    assert "test/accuracy" in run_the_example("add_task.md", tmp_path, "task=parity", "memory.max_span=32")


def test_the_environment_of_the_docs_trains(tmp_path):
    sizes = ["memory.max_span=32", "eval.max_blocks=2", "actor_critic.update_epochs=1"]
    assert "test/rl/success" in run_the_example(
        "environments.md", tmp_path, "task=repeat", "recipe=gymnasium/mini", *sizes
    )


def test_the_mechanism_of_the_docs_trains(tmp_path):
    out = run_the_example("add_mechanism.md", tmp_path, "model=strided", "memory.max_span=32", *SMALL_TASKS["copy"])
    assert "test/memory/size" in out
