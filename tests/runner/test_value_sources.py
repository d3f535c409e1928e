"""The marks of conf/ against what the paper and the released code say, and the form that they must have."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from expire_span.runner.config.schema import validate
from expire_span.runner.config.value_sources import NO_SOURCE, THROUGHOUT, marked_values, value_sources

PACKAGE = ["pkg://expire_span.conf"]
CONF = Path(str(files("expire_span.conf")))
FILES = sorted(CONF.rglob("*.yaml"))
OURS, RELEASED = "our choice", "the authors' released code"


def sources_of(*overrides, folders=PACKAGE, **choices):
    """The sources of a command line: choices of config groups, and overrides."""
    groups = [f"{group}={option}" for group, option in choices.items()]
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=[*groups, *overrides], return_hydra_config=True)
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return value_sources(validate(config), chosen, folders, [*groups, *overrides])


def marked(mark, *overrides, **choices):
    return sources_of(*overrides, **choices)["value_sources"][mark]


def keys(text):
    """Dotted keys of `section: name name; section: name`."""
    sections = (part.split(":") for part in text.split(";"))
    return {f"{section.strip()}.{name}" for section, names in sections for name in names.split()}


EVAL = "eval: interval batch_size block_size"
LANGUAGE_MODEL = "transformer: embedding_std embedding_dropout"
PAPER_SIZE = {  # of each task, with Expire-Span: our choice; the released code
    "enwik8": (
        f"{LANGUAGE_MODEL}; {EVAL}",
        "memory: ramp alpha init_span_ratio random_drop; transformer: feedforward_size dropout pre_norm;"
        "lr_schedule: name; train: grad_clip; model: pre_div",
    ),
    "pg19": (
        f"{LANGUAGE_MODEL}; {EVAL}; memory: max_span random_drop; optimizer: _target_ lr; train: updates batch_size",
        "memory: init_span_ratio; transformer: pre_norm; model: pre_div",
    ),
    "wikitext103": (
        f"{EVAL}; memory: random_drop; transformer: cutoffs",
        "memory: ramp alpha init_span_ratio; transformer: pre_norm; lr_schedule: name; model: pre_div",
    ),
    "collision": (
        f"{LANGUAGE_MODEL}; {EVAL}; lr_schedule: name; task: num_simulations eval_simulations",
        "memory: ramp alpha init_span_ratio; optimizer: _target_ lr; lr_schedule: warmup_updates;"
        "transformer: num_layers hidden_size num_heads feedforward_size dropout pre_norm;"
        "train: updates batch_size block_size grad_clip; task: velocity_std eval_timesteps; model: pre_div",
    ),
    "collision_easy": (
        f"{LANGUAGE_MODEL} num_layers hidden_size num_heads feedforward_size dropout pre_norm; {EVAL};"
        "memory: ramp alpha init_span_ratio random_drop; optimizer: _target_ lr; lr_schedule: warmup_updates name;"
        "train: updates batch_size block_size grad_clip;"
        "task: mapping_question_fraction num_simulations eval_simulations",
        "task: velocity_std eval_timesteps; model: pre_div",
    ),
    "copy": (
        f"{LANGUAGE_MODEL} num_layers hidden_size num_heads feedforward_size dropout pre_norm; {EVAL};"
        "memory: ramp alpha init_span_ratio random_drop; optimizer: _target_ lr; lr_schedule: warmup_updates name;"
        "train: updates batch_size block_size grad_clip curriculum_interval;"
        "task: episode_length initial_episode_length max_count"
        " curriculum_threshold curriculum_max_intervals num_eval_episodes",
        "model: pre_div",
    ),
    "instruction": (
        f"{LANGUAGE_MODEL} feedforward_size dropout; {EVAL}; memory: max_span random_drop; lr_schedule: name;"
        "train: updates batch_size block_size grad_clip curriculum_interval;"
        "task: map_path initial_distractors curriculum_threshold eval_tokens",
        "memory: init_span_ratio; transformer: pre_norm; task: instruction_prob max_pending; model: pre_div",
    ),
    "corridor": (
        f"{LANGUAGE_MODEL} num_heads feedforward_size dropout pre_norm; {EVAL} max_blocks; memory: random_drop;"
        "lr_schedule: warmup_updates name; train: grad_clip; task: random_door_sides max_episode_steps"
        " observe_last_action; actor_critic: discount gae_lambda value_coef update_epochs normalize_advantage"
        " bootstrap_truncated",
        "memory: init_span_ratio; model: pre_div",
    ),
    "portal": (
        f"{LANGUAGE_MODEL} num_heads feedforward_size dropout pre_norm; {EVAL} max_blocks; memory: random_drop;"
        "lr_schedule: warmup_updates name; train: updates; task: observe_last_action;"
        "actor_critic: gae_lambda value_coef update_epochs normalize_advantage bootstrap_truncated",
        "memory: init_span_ratio; model: pre_div",
    ),
}


@pytest.mark.parametrize("task", PAPER_SIZE)
def test_at_the_papers_size_exactly_these_values_are_not_the_papers(task):
    sources = sources_of(task=task, size="paper")["value_sources"]
    ours, released = PAPER_SIZE[task]
    assert set(sources[OURS]) == keys(ours)
    assert set(sources[RELEASED]) == keys(released)


def test_a_preset_names_what_the_paper_leaves_open_and_nothing_else():
    spans = {
        "table4_pg19_expire_span": {"memory.max_span": 16384},
        "figure6_expire_span_16k": {},
        "table4_pg19_adaptive_span": {"model.max_span": 16384},
        "table3_adaptive_span": {},
        "table2_trans_xl": {"model.max_span": 1024},
        "figure6_trans_xl_1k": {},
        "table3_compressive": {},
        "table4_enwik8_compressive": {"model.max_span": 2048, "model.compressed_size": 2048},
        "table1_expire_span_16k": {},
    }
    for experiment, expected in spans.items():
        ours = marked(OURS, experiment=experiment)
        assert {key: value for key, value in ours.items() if key.endswith(("max_span", "compressed_size"))} == expected
    assert "memory.random_drop" not in str(sources_of(experiment="table3_expire_span_64k"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_a_mark_begins_the_comment_of_a_line_with_values_or_covers_the_whole_file(path):
    text = path.read_text()
    text_of_legend = "# A comment that begins with (c) marks our own choice, with (r) a value of"
    lines = text.replace(text_of_legend, "").splitlines()
    throughout = THROUGHOUT.search(text)
    if throughout:
        assert throughout.start() == text.index("# (c) throughout") <= len("# @package _global_\n")
        lines = [line.removeprefix("# (c) throughout") for line in lines]
    source = [(key, node) for key, node in scalars(yaml.compose(text)) if not key.startswith(NO_SOURCE)]
    lines_with_values = {node.start_mark.line for _, node in source}
    for number, line in enumerate(lines):
        if re.search(r"\([cr]\)", line):
            assert not throughout, f"marked twice: {line}"
            assert len(re.findall(r"\(\w\)", line)) == 1, line
            assert re.search(r"[^#]+ # \([cr]\)( |$)", line), f"not at the beginning of a comment: {line}"
            assert number in lines_with_values, f"marks nothing: {line}"


def scalars(node, prefix=""):
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(value, f"{prefix}.{key.value}".lstrip("."))
    elif node is not None:
        yield prefix, node


@pytest.mark.parametrize("override", ["memory.ramp=9", "++memory.ramp=9", "memory={ramp:9}", "memory.ramp=32"])
def test_a_value_that_the_user_has_set_has_no_source(override):
    assert "memory.ramp" in marked(OURS, task="copy", size="paper")
    assert "memory.ramp" not in marked(OURS, override, task="copy", size="paper")
    assert "train.grad_clip" in marked(OURS, override, task="copy", size="paper")


def test_a_value_that_follows_one_of_the_users_has_no_source():
    assert marked(OURS, task="copy", size="mini", model="trans_xl")["model.max_span"] == 256
    assert "model.max_span" not in marked(OURS, "memory.max_span=64", task="copy", size="mini", model="trans_xl")


def test_the_last_file_that_sets_a_value_decides():
    assert marked(OURS, task="enwik8", size="mini")["memory.ramp"] == 32
    assert marked(RELEASED, task="enwik8", size="paper")["memory.ramp"] == 128
    assert "memory.ramp" not in str(sources_of(task="portal", size="paper"))


@pytest.mark.parametrize(
    ("unused", "choices"),
    [
        ("memory.", {"model": "trans_xl"}),
        ("memory.", {"model": "compressive"}),
        ("memory.num_positions", {"model": "adaptive_span", "task": "collision"}),
        ("alpha_schedule.", {"model": "trans_xl", "task": "collision"}),
        ("lr_schedule.span_lr_factor", {"model": "trans_xl"}),
        ("lr_schedule.final_updates", {"model": "trans_xl", "task": "text"}),
        ("actor_critic.", {}),
        ("actor_critic.clip_coef", {"task": "corridor", "size": "paper"}),
        ("task.curriculum", {"task": "corridor", "size": "paper"}),
        ("transformer.embedding_std", {"task": "wikitext103"}),
        ("run.", {}),
        ("seed", {}),
    ],
)
def test_values_that_the_run_does_not_use_are_not_listed(unused, choices):
    choices = {"task": "copy", "size": "mini", **choices}
    path = ["task.path=x"] if choices["task"] == "text" else []
    sources = sources_of(*path, **choices)["value_sources"]
    assert not [key for values in sources.values() for key in values if key.startswith(unused)]


def test_the_counterparts_that_are_used_are_listed():
    ours = marked(OURS, task="collision", size="mini")
    assert {"alpha_schedule.start_update", "lr_schedule.span_lr_factor", "memory.num_positions"} <= set(ours)
    corridor = marked(OURS, task="corridor", size="mini")
    assert {"actor_critic.clip_coef", "task.curriculum_growth"} <= set(corridor)


def test_a_simplification_is_told_until_its_key_is_set():
    notes = sources_of(task="instruction", size="paper")["simplifications"]
    assert notes == ["a built-in map of 13 rooms, not LIGHT's of 41"]
    assert sources_of("task.map_path=map.json", task="instruction", size="paper")["simplifications"] == []
    mini = sources_of("task.num_rooms=50", task="portal", size="mini")["simplifications"]
    assert mini == ["rooms of 9 x 9 cells, not 5 x 5", "training begins with 2 rooms", "at most 200 steps, not 1000"]
    assert sources_of(task="portal", size="paper")["simplifications"] == []


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("recipe/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_simplification_is_about_a_key_and_its_numbers_are_those_of_the_value(path):
    recipe = yaml.safe_load(path.read_text())
    is_size = (CONF / "size" / path.name).exists()
    config = sources_config(
        path.parent.name, path.stem if is_size else "mini", f"recipe={path.parent.name}/{path.stem}"
    )
    for key, note in recipe.get("simplified", {}).items():
        value = OmegaConf.select(config, key, throw_on_missing=True)
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert any(text in note for text in (f"{value:,}", str(value), f"{value / 1e6:g} million")), note


def sources_config(task, size, *overrides):
    path = ["task.path=x"] if task == "text" else []
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        return compose("config", overrides=[f"task={task}", f"size={size}", *path, *overrides])


def test_marks_are_also_read_from_the_users_own_files(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task/mine.yaml").write_text("# Mine.\nmax_count: 4   # (c) as many as A's\n")
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = compose("config", overrides=["task=copy"])
    sources = value_sources(config, {"task": "mine"}, [f"file://{tmp_path}", *PACKAGE, "pkg://no.such.module"], [])
    assert "task.max_count" in sources["value_sources"][OURS]


def test_a_mark_counts_only_at_the_beginning_of_a_comment():
    text = 'a: 1   # see (c)\nb: "(r)"\nc: 3   # (r) from the code\nd: [4,   # (c)\n  5]\n'
    assert {key: mark for key, _, mark in marked_values(text)}["c"] == "(r)"
    assert [key for key, _, mark in marked_values(text) if mark] == ["c", "d"]
