"""A run folder from somebody else is data: opening it runs no code that it brings or names."""

import os
import sys

import pytest
import yaml
from tiny_config import tiny_config

from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.config_files import ConfigFiles, load_config, load_config_files
from expire_span.runner.run_folder.files import write_texts


@pytest.fixture
def run(folder):
    """A run folder with its .hydra, and what changes its config."""
    files = ConfigFiles(tiny_config(), {"runtime": {"choices": {"task": "copy"}}}, ["seed=1"])
    write_texts(folder, files.texts())

    def change(key, value):
        path = folder / ".hydra/config.yaml"
        config = node = yaml.safe_load(path.read_text())
        *sections, name = key.split(".")
        for section in sections:
            node = node[section]
        node[name] = value
        path.write_text(yaml.safe_dump(config))
        return folder

    change("seed", 1)
    return change


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported."""
    (tmp_path / "trap_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Task: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "sprung"
    sys.modules.pop("trap_module", None)


TARGETS = ["os.system", "subprocess.Popen", "numpy.load", "torch.load", "shutil.rmtree", "builtins.exec", "hydra.main"]


@pytest.mark.parametrize("section", ["task", "model", "optimizer"])
@pytest.mark.parametrize("target", [*TARGETS, "trap_module.Task", "expire_spanner.Task", None, 3])
def test_a_run_folder_names_no_code_but_ours(run, trap, section, target):
    folder = run(f"{section}._target_", target)
    with pytest.raises(ValueError, match=rf"^{section}._target_={target} of .* is no part of expire-span"):
        load_config(folder)
    assert not trap.exists()


@pytest.mark.parametrize(
    "target",
    ["expire_span.runner.run_folder.provenance.subprocess.Popen", "expire_span.Transformer", "torch.optim.os.system"],
)
def test_what_can_be_reached_through_our_modules_is_no_task(run, target):
    with pytest.raises(ValueError, match="^task._target_"):
        validate(load_config(run("task._target_", target)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model._args_", [{"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True}]),
        ("task._partial_", True),
        ("optimizer._recursive_", True),
        ("task.episode_length", {"_target_": "os.system", "command": "true"}),
        ("memory._target_", "os.system"),
    ],
)
def test_no_key_is_acted_upon_but_the_three_targets(run, key, value):
    with pytest.raises(ValueError, match=f"{key}.* is not allowed"):
        validate(load_config(run(key, value)))


def test_a_class_that_the_user_names_is_trusted(run, trap, monkeypatch):
    folder = run("task._target_", "trap_module.Task")
    assert load_config(folder, ["task._target_=trap_module.Task"]).task._target_ == "trap_module.Task"
    with pytest.raises(ValueError, match="say so"):
        load_config(folder, ["model._target_=trap_module.Task"])
    monkeypatch.setenv("EXPIRE_SPAN_TRUST", "other,trap_module")
    assert load_config(folder).task._target_ == "trap_module.Task"
    assert not trap.exists()


def test_nothing_in_a_run_folder_is_resolved(run, monkeypatch):
    monkeypatch.setenv("SECRET", "secret")
    config = validate(load_config(run("wandb.entity", "${oc.env:SECRET}")))
    assert config.wandb.entity == "${oc.env:SECRET}"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
HOSTILE = {
    "aliases that stand for terabytes": BOMB,
    "references that stand for terabytes": "a0: xx\n" + "".join(f"a{i + 1}: ${{a{i}}}${{a{i}}}\n" for i in range(64)),
    "a tag": "task: !!python/object/apply:os.system [true]\n",
    "nesting": "[" * 100_000,
    "a list": "[1, 2]",
    "a number": "3",
    "nothing": "",
    "no YAML": "{{{:",
    "no text": "\udcff\udcfe",
    "a large file": "# " + "x" * 2**21,
    "keys of other types": "1: 2\nnull: 3\n? [a]\n: b\n",
}


@pytest.mark.parametrize("name", ["config", "hydra", "overrides"])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_in_a_run_folder_is_refused_in_one_line(run, content, name):
    folder = run("seed", 1)
    (folder / f".hydra/{name}.yaml").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises((ValueError, OSError), match="^[^\n]+$") as caught:
        load_config_files(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [".hydra/hydra.yaml", "metrics.jsonl", "vocab.json", "checkpoint_2.pt"])
def test_a_pipe_in_a_run_folder_is_refused_instead_of_read_for_ever(run, name):
    folder = run("seed", 1)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe or a device"):
        load_config_files(folder)
