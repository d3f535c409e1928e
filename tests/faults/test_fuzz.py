"""Whatever is on the command line or in a run folder, a command runs, or ends with one line and a code other than 0.

Each case is a command in a process of its own, with limits of time and memory. `make test-faults` runs them all, and
prints how they ended; a sample is part of the default suite.
"""

import itertools
import random
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked_command import assert_runs_or_ends_with_one_line, forked_command
from odd_values import VALUES
from omegaconf import OmegaConf
from tiny_config import COPY

from expire_span.runner.run_folder import checkpoint

KEYS = (Path(__file__).parents[1] / "expected/config_keys.txt").read_text().split()
SMALL = [*COPY, "train.updates=2", "run.checkpoint_every=1", "eval.splits=[test]"]
SECTIONS = sorted({key.partition(".")[0] for key in KEYS if "." in key})


def override_cases(source):
    """The kind and the arguments of commands that train, or should not."""
    for key in KEYS:
        for value in [*source.sample(VALUES, 3), f"${{{key}}}"]:
            yield "value of a key", [f"{key}={value}"]
    for section in (*SECTIONS, "hydra", "hydra.run", "paper"):
        for value in source.sample(["null", "3", "false", "[]", "{}", "text"], 3):
            yield "value of a section", [f"{section}={value}"]
        own = ["_partial_=true", "_args_=[1]", "_target_=os.system", "_recursive_=false", "_convert_=all"]
        for override in source.sample(own, 2):
            yield "key of Hydra's own", [f"++{section}.{override}"]
        yield "removed section", [f"~{section}"]
    for key in KEYS[::4]:
        yield "misspelled key", [f"{key[:-2]}{key[-1]}{key[-2]}=1"]
    for name in sorted(name for name, value in vars(torch.optim).items() if isinstance(value, type)):
        yield "optimizer", [f"optimizer._target_=torch.optim.{name}"]
        flag = source.choice(["capturable", "fused", "foreach", "differentiable", "maximize", "params", "closure"])
        yield "optimizer", [f"optimizer._target_=torch.optim.{name}", f"+optimizer.{flag}=true"]
    for value in ("torch.optim", "torch.Tensor", "os.system", "Adam", "", "null", "3", "[]", "expire_span.ExpireSpan"):
        yield "class", [f"{source.choice(['optimizer', 'model', 'task'])}._target_={value}"]
    for device in ("cpu:x", "cpu:-1", "cuda", "cuda:99", "meta", "mps", "CPU", "cpu cuda", "xla", "''"):
        yield "device", [f"run.device={device}"]
    for group, option in itertools.product(
        ("task", "model", "size", "recipe", "experiment"), ("typo", "null", "[]", "../x")
    ):
        yield "option of a group", [f"{group}={option}"]
    for key in ("hidden_size", "feedforward_size", "num_heads", "num_layers"):
        for value in (10**11, 2**48):
            yield "size", [f"transformer.{key}={value}"]
    for key in ("memory.max_span", "train.batch_size", "train.block_size", "eval.batch_size", "task.episode_length"):
        for value in (10**11, 2**48):
            yield "size", [f"{key}={value}"]
    for flags in (
        *(["--cfg"], ["--cfg", "job"], ["--cfg", "x"], ["--info"], ["--info", "defaults"], ["--info", "x"], ["--help"]),
        *(["--version"], ["--hydra-help"], ["--resolve"], ["--package"], ["--package", "x", "--cfg", "job"], ["-c"]),
        *(
            ["--unknown"],
            ["--config-name"],
            ["--config-name", "x"],
            ["--config-dir", "nowhere"],
            ["--config-path", "x"],
        ),
        *(["--run"], ["--experimental-rerun", "x"], ["--shell-completion"], ["-"], ["--"], ["-x=3"], ["--seed=3"]),
        *(["foo"], ["foo", "bar"], ["="], ["=3"], ["+"], ["~"], ["seed"], ["seed="], ["+seed=1"], ["seed=1", "seed=2"]),
        *(["++"], ["seed==1"], ["seed =1"], ["seed= 1"], ["@x=1"], ["task@x=copy"], ["a.b@c=d"], ["task:copy=text"]),
        *(["hydra/launcher=nowhere"], ["hydra.job.chdir=true"], ["hydra.verbose=true"], ["hydra.mode=MULTIRUN"]),
        *(["-m", "hydra.sweep.dir=sweep", "seed=x"], ["-m", "seed=1,x", "hydra.sweep.dir=sweep"], ["-m", "seed=1,"]),
    ):
        yield "flag", flags
    for action, value in itertools.product(
        ("evaluate", "resume"),
        (
            "null",
            "''",
            "3",
            "true",
            "[]",
            "{}",
            "nowhere",
            ".",
            "/",
            "a,b",
            "${seed}",
            "${oc.env:HOME}",
            "x" * 5000,
            "\0",
        ),
    ):
        yield "name of a run", [f"{action}={value}"]
    for folder in (
        "a_file",
        "a_file/x",
        "/proc/x",
        "x" * 300,
        "''",
        "null",
        "3",
        "[]",
        "{}",
        "${seed}",
        "locked/x",
        ".",
    ):
        yield "run folder", [f"hydra.run.dir={folder}"]


OVERRIDES = list(enumerate(override_cases(random.Random(1))))


def readings(text):
    """The values that a person can mean by a text: as it is, and as a number, a truth value, or nothing."""
    texts = {text, text.strip("'"), text.strip('"'), text.strip("\"'"), text.lstrip("~")}
    yield from texts
    for kind in (int, float):
        for text in texts:
            with suppress(ValueError, OverflowError):
                yield kind(text)
                yield bool(kind(text))  # as in Python
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    yield from (value for word, value in {**words, "null": None}.items() if word in texts)


def check_override(kind, arguments, folder):
    """Returns the outcome."""
    (folder / "a_file").write_text("")
    (folder / "locked").mkdir(mode=0o500)
    run = folder / "run"
    own = [] if kind in ("run folder", "name of a run") else ["hydra.run.dir=run"]
    command = ["expire-span", *SMALL, *own, *arguments]
    if kind == "name of a run" or "--hydra-help" in arguments:
        command = ["expire-span", *arguments]
    compiles = arguments[0].startswith("run.compile=")  # for one or two minutes, and more on a busy machine
    ended = forked_command(command, folder, seconds=600 if compiles else 60)
    outcome = assert_runs_or_ends_with_one_line(ended, arguments)
    looks_like_a_run = [path.name for path in run.glob("*") if path.name in (".hydra", "summary.json")]
    looks_like_a_run += checkpoint.paths(run) if run.is_dir() else []
    if outcome == "ran" and kind == "value of a key" and run.exists():
        key, _, text = arguments[0].partition("=")
        used = OmegaConf.select(OmegaConf.load(run / ".hydra/config.yaml"), key)
        assert (
            OmegaConf.is_config(used)
            or re.search(r"\$\{|\(", text)
            or any(used == value and type(used) is type(value) for value in readings(text))
        ), f"{arguments} used {used!r}"
    if outcome == "one line" and looks_like_a_run:
        again = forked_command(["expire-span", "resume=run"], folder)
        assert_runs_or_ends_with_one_line(again, f"{arguments}, then resume")
        assert again.code == 0 or again.stderr == ended.stderr, f"{arguments}, then resume: {again.stderr}"
        outcome = "one line, and a run that goes on"
    return outcome


def check_overrides(cases, tmp_path, count):
    problems = []
    for number, (kind, arguments) in cases:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            count(f"command line: {kind}", check_override(kind, arguments, folder))
        except AssertionError as problem:
            problems.append(f"{kind} {number}: {problem}")
            count(f"command line: {kind}", "failed")
        shutil.rmtree(folder)
    assert not problems, "\n\n".join(problems)


PARTS = 12


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_any_override_runs_or_ends_with_one_line(part, tmp_path, count):
    check_overrides(OVERRIDES[part::PARTS], tmp_path, count)


def test_a_sample_of_all_overrides_runs_or_ends_with_one_line(tmp_path, count):
    check_overrides(OVERRIDES[::80], tmp_path, count)
