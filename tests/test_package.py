"""What a user installs: complete, found from anywhere, and in nobody's way."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"expire_span": "expire_span", "expire_span/tasks": "tasks", "expire_span/conf": "conf"}
CODE = (".py", ".cpp", ".h", ".yaml", ".html", ".css", ".js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "expire_span", "tasks", "conf"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    out = copy.parent / "wheel"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    subprocess.run(build, check=True, timeout=120)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(*arguments, installed, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_the_wheel_holds_every_source_and_config_and_no_other_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} <= {"expire_span"} | {wheel.name.split("-")[0]}
    for inside, source in SOURCES.items():
        for path in (ROOT / source).rglob("*"):
            if path.suffix in CODE:
                assert f"{inside}/{path.relative_to(ROOT / source)}" in names


def test_it_works_from_a_folder_that_has_folders_named_tasks_and_conf(installed, tmp_path):
    for name in ("tasks", "conf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    program = "import expire_span, tasks, conf; print(expire_span.__file__, tasks.mine, conf.mine)"
    where, *mine = python("-c", program, installed=installed, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert mine == ["True", "True"]
    config = python("-m", "expire_span", "--cfg", "job", "model=trans_xl", installed=installed, cwd=tmp_path)
    assert "_target_: expire_span.TransXL" in config


TASK = """
from expire_span.tasks.text import Text


class Parity(Text):
    def __init__(self, path: str):
        super().__init__(path)
"""
MECHANISM = """
import torch

from expire_span import Mechanism


class LongFirstLayer(Mechanism):
    def __init__(self, max_span: int, ramp: float):
        super().__init__(max_span, ramp, num_positions=max_span)

    def span(self, memory):
        return torch.full((1, 1), float(self.max_span))
"""
CONFIGS = {
    "task/parity.yaml": "_target_: MODULE.Parity\npath: bits.txt\n",
    "model/long_first_layer.yaml": "_target_: MODULE.LongFirstLayer\nmax_span: ${memory.max_span}\nramp: 4\n",
}
TRAIN = ["task=parity", "model=long_first_layer", "train.updates=2", "train.batch_size=2", "memory.max_span=64"]


def write_configs(folder, module):
    for name, text in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text.replace("MODULE", module))


def test_a_task_and_a_mechanism_of_the_users_own_need_one_file_and_one_yaml_each(installed, tmp_path):
    (tmp_path / "my_task.py").write_text(TASK + MECHANISM)
    write_configs(tmp_path / "mine", "my_task")
    (tmp_path / "bits.txt").write_text("0110100110010110" * 500)
    arguments = ["-m", "expire_span", "--config-dir", "mine", *TRAIN, "wandb.mode=disabled"]
    assert "test/bpb" in python(*arguments, installed=installed, cwd=tmp_path)


@pytest.mark.slow
def test_an_installed_package_adds_its_task_and_mechanism_by_an_entry_point(installed, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package/__init__.py").write_text(TASK + MECHANISM)
    write_configs(site / "my_package/conf", "my_package")
    (site / "my_package/conf/__init__.py").write_text("")
    metadata = site / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[expire_span.conf]\nmine = my_package.conf\n")
    work.mkdir()
    (work / "bits.txt").write_text("0110100110010110" * 500)
    both = f"{installed}{os.pathsep}{site}"
    output = python("-m", "expire_span", *TRAIN, "wandb.mode=disabled", installed=both, cwd=work)
    assert "test/bpb" in output
    [summary] = work.glob("runs/*/*/summary.json")
    resumed = ["-m", "expire_span", f"resume={summary.parent}", "train.updates=3"]
    assert "test/bpb" in python(*resumed, installed=both, cwd=work)


def test_help_is_this_projects_own_and_names_every_model(installed, tmp_path):
    out = python("-m", "expire_span", "--help", installed=installed, cwd=tmp_path)
    assert "Transformers that learn what to forget" in out
    for words in (
        "evaluate=RUN",
        "resume=RUN",
        "model: trans_xl, adaptive_span, compressive, expire_span (the paper's)",
    ):
        assert words in out


def test_every_file_of_code_stays_below_400_lines():
    folders = ("expire_span", "tasks", "conf", "scripts", "examples", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    assert len(paths) > 200
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_the_readmes_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_readmes_commands_name_real_make_targets():
    targets = re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert f"\n{target}:" in makefile
