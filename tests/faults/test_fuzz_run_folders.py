"""Whatever is in a run folder, a command that opens it gives the true result, or ends with one line.

Each file of a finished run is damaged in each way, and opened by several commands.
"""

import json
import os
import random
import shutil

import pytest
import yaml
from forked_command import assert_runs_or_ends_with_one_line, forked_command
from odd_values import VALUES
from safetensors.torch import load_file
from tiny_config import SMALL_SIZES, SMALL_TASKS

from expire_span.runner.run_folder import checkpoint

SMALL = ["memory.max_span=32", *SMALL_SIZES, "train.updates=2", "run.checkpoint_every=1", "eval.interval=1"]
TEXT = "".join(f"{number} bottles of beer on the wall, {number} bottles. " for number in range(40))
NESTED = b"[" * 100_000
COMMANDS = {
    "resume": ["expire-span", "resume=run", "train.updates=3"],
    "evaluate": ["expire-span", "evaluate=run", "hydra.run.dir=evaluated"],
    "evaluate the best weights": ["expire-span", "evaluate=run", "hydra.run.dir=evaluated", "eval.weights=best"],
    "generate": ["expire-span-generate", "run", "--temperature", "0", "--max-new-tokens", "8"],
    "play": ["expire-span-play", "run", "--steps", "4"],
    "report": ["expire-span-report", "."],
}


def write(content):
    return lambda path, source: path.write_bytes(content)


def link(target):
    def damage(path, source):
        path.unlink()
        path.symlink_to(target)

    return damage


def flip(path, source):
    content = bytearray(path.read_bytes())
    if content:
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)


def folder_of_this_name(path, source):
    path.unlink()
    path.mkdir()


def pipe(path, source):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "removed": lambda path, source: path.unlink(),
    "empty": write(b""),
    "truncated": lambda path, source: os.truncate(path, source.randrange(path.stat().st_size + 1)),
    "flipped bit": flip,
    "zeroed": lambda path, source: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": folder_of_this_name,
    "a link to another file": link("../outside"),
    "a link to nothing": link("nowhere"),
    "a link to itself": lambda path, source: link(path.name)(path, source),
    "a pipe": pipe,
    "binary": lambda path, source: path.write_bytes(source.randbytes(3000)),
    "null": write(b"null"),
    "a number": write(b"5"),
    "a text": write(b'"text"'),
    "a list": write(b"[1, [2]]"),
    "a dictionary": write(b'{"a": {"b": 1}}'),
    "nested": write(NESTED),
    "nested and closed": write(NESTED + b"]" * len(NESTED)),
    "a long number": write(b"9" * 10_000),
    "large": write(b'["' + b"x" * 2**22 + b'"]'),
    "a tag": write(b"!!python/object/apply:os.system [true]"),
    "of Windows": lambda path, source: path.write_bytes(b"\xff\xfe" + path.read_bytes().replace(b"\n", b"\r\n")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs, and what each command gives of them."""
    base = tmp_path_factory.mktemp("runs")
    (base / "text.txt").write_text(TEXT)
    tasks = {"text": [f"task.path={base / 'text.txt'}"], "corridor": SMALL_TASKS["corridor"]}
    expected = {}
    for task, overrides in tasks.items():
        folder = base / task
        folder.mkdir()
        command = ["expire-span", f"task={task}", *SMALL, *overrides, "hydra.run.dir=run"]
        ended = forked_command(command, folder)
        assert ended.code == 0, ended.stderr
        for name in commands_of(task):
            shutil.copytree(folder / "run", base / "copy" / "run")
            ended = forked_command(COMMANDS[name], base / "copy")
            assert ended.code == 0, ended.stderr
            expected[task, name] = figures(name, base / "copy", ended)
            shutil.rmtree(base / "copy")
    return base, expected


def commands_of(task):
    return [name for name in COMMANDS if name != {"text": "play", "corridor": "generate"}[task]]


def figures(name, folder, ended):
    """What a command is for."""
    if name == "resume":
        return {key: tensor.tolist() for key, tensor in load_file(folder / "run/model.safetensors").items()}
    if name.startswith("evaluate"):
        metrics = json.loads((folder / "evaluated/summary.json").read_text())["metrics"]
        return {key: value for key, value in metrics.items() if "perf/" not in key}
    return ended.stdout


def check(name, folder, expected, what):
    """Returns the outcome."""
    (folder / "outside").write_text("text of another file\n")
    ended = forked_command(COMMANDS[name], folder)
    outcome = assert_runs_or_ends_with_one_line(ended, f"{what}, then {name}")
    assert (folder / "outside").read_text() == "text of another file\n", what
    if ended.code == 0 and expected is not None and name != "report":
        assert figures(name, folder, ended) == expected, f"{what}, then {name}: another result"
        return "the same result"
    if ended.code != 0:
        made = [path.name for path in (folder / "evaluated").glob("*") if path.name in (".hydra", "summary.json")]
        assert not made, f"{what}, then {name}: leaves {made}"
    return outcome


def damage_cases(source):
    """Task, kind of damage, number of the file, and command."""
    for kind in DAMAGE:
        for number in range(11):
            yield "text", kind, number, source.choice(commands_of("text"))
        yield "corridor", kind, source.randrange(10), source.choice(commands_of("corridor"))


def files_of(run):
    names = {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "metrics.jsonl", "summary.json"}
    names |= {"model.safetensors", "best.safetensors", "run.log", "vocab.json", ".lock"}
    return sorted(path for name in names if (path := run / name).exists()) + checkpoint.paths(run)


def check_damage(cases, runs, tmp_path, count):
    (base, expected), problems = runs, []
    for number, (task, kind, file, name) in cases:
        folder = tmp_path / str(number)
        run = shutil.copytree(base / task / "run", folder / "run")
        path = files_of(run)[file % len(files_of(run))]
        source = random.Random(number)
        DAMAGE[kind](path, source)
        what = f"case {number}: {path.relative_to(folder)} is {kind}"
        try:
            count(f"file of a run: {kind}", check(name, folder, expected[task, name], what))
        except AssertionError as problem:
            problems.append(str(problem))
            count(f"file of a run: {kind}", "failed")
        shutil.rmtree(folder)
    assert not problems, "\n\n".join(problems)


def places(node):
    """Every place of a nested value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield node, key
        yield from places(value)


def check_values(cases, runs, tmp_path, count):
    """One value of config.yaml or summary.json replaced by another."""
    (base, _), problems = runs, []
    for number in cases:
        source = random.Random(number)
        task = source.choice(["text", "corridor"])
        folder = tmp_path / str(number)
        run = shutil.copytree(base / task / "run", folder / "run")
        path = run / source.choice([".hydra/config.yaml", ".hydra/config.yaml", ".hydra/hydra.yaml", "summary.json"])
        content = yaml.safe_load(path.read_text())
        node, key = source.choice(list(places(content)))
        node[key] = yaml.safe_load(source.choice(["1", "-1", "2.5", ".nan", "null", "[]", "{}", "[1]", "a", "true"]))
        if source.random() < 0.3:
            node[key] = source.choice(VALUES)
        path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, allow_unicode=True))
        name = source.choice(commands_of(task))
        what = f"case {number}: {path.relative_to(folder)} has {key}: {node[key]!r:.60}"
        try:
            count(f"value in {path.name} of a run", check(name, folder, None, what))
        except AssertionError as problem:
            problems.append(str(problem))
            count(f"value in {path.name} of a run", "failed")
        shutil.rmtree(folder)
    assert not problems, "\n\n".join(problems)


CASES = list(enumerate(damage_cases(random.Random(2))))
PARTS = 8


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_with_any_damaged_file_gives_its_result_or_ends_with_one_line(part, runs, tmp_path, count):
    check_damage(CASES[part::PARTS], runs, tmp_path, count)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_with_any_value_in_its_files_works_or_ends_with_one_line(part, runs, tmp_path, count):
    check_values(range(part, 100, PARTS), runs, tmp_path, count)
