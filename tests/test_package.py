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
            if path.suffix in (".py", ".cpp", ".yaml"):
                assert f"{inside}/{path.relative_to(ROOT / source)}" in names


def test_it_works_from_a_folder_with_tasks_and_conf_of_its_own(installed, tmp_path):
    for name in ("tasks", "conf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    program = "import expire_span, tasks, conf; print(expire_span.__file__, tasks.mine, conf.mine)"
    where, *mine = python("-c", program, installed=installed, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert mine == ["True", "True"]
    config = python("-m", "expire_span", "--cfg", "job", "model=trans_xl", installed=installed, cwd=tmp_path)
    assert "_target_: expire_span.TransXL" in config


def test_a_task_of_the_users_own_needs_one_file_and_one_yaml(installed, tmp_path):
    (tmp_path / "parity.py").write_text(
        "from expire_span.tasks.text import Text\n\n\n"
        "class Parity(Text):\n"
        "    def __init__(self, path: str):\n"
        "        super().__init__(path)\n"
    )
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "parity.yaml").write_text("_target_: parity.Parity\npath: bits.txt\n")
    (tmp_path / "bits.txt").write_text("0110100110010110" * 500)
    sizes = ["train.updates=2", "train.batch=2", "wandb.mode=disabled", "memory.max_span=64"]
    out = python("-m", "expire_span", "--config-dir", "mine", "task=parity", *sizes, installed=installed, cwd=tmp_path)
    assert "test/bpb" in out


def test_help_speaks_of_this_project(installed, tmp_path):
    out = python("-m", "expire_span", "--help", installed=installed, cwd=tmp_path)
    assert "Transformers that learn what to forget" in out
    for each in ("evaluate=RUN", "resume=RUN", "model: adaptive_span, compressive, expire_span, trans_xl"):
        assert each in out


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
