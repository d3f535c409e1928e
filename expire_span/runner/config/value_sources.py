"""Which values of a run are not the paper's, and what its recipe simplifies.

A value is written once, in a YAML file of conf/, and the comment at the end of its line may begin with a mark: (c) for
our own choice, (r) for the authors' released code. A file whose first comment begins with "(c) throughout" marks all
that it sets. The mark stays beside its value because a separate list of marks would be forgotten when the value
changes; tests/runner/test_value_sources.py refuses everything that could be mistaken for a mark.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from expire_span.tasks.base import RLTask

from .overrides import GROUPS, parse

SOURCES = {"(c)": "our choice", "(r)": "the authors' released code"}
THROUGHOUT = re.compile(r"^# (\([cr]\)) throughout", re.MULTILINE)
AT_END_OF_LINE = re.compile(r" # (\([cr]\))")
# Sections and keys that say how the program runs, or what is compared
NO_SOURCE = (
    *("defaults", "hydra", "paper", "simplified", "milestones", "run", "wandb", "tracker", "seed", "evaluate"),
    *("task._target_", "task.seed", "model._target_"),
)


def value_sources(
    config: DictConfig, choices: Mapping[str, str | None], folders: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """For a run's summary: the values that are not the paper's, by source, and the simplifications of its recipe.

    Only values that the run depends on are listed, and none that the user has set.

    Args:
        config: the composed config, resolved.
        choices: the option chosen in each config group.
        folders: where the group's files are searched: paths, or pkg://MODULE.
        overrides: those of the command line.
    """
    written: dict[str, tuple[str, str | None]] = {}  # key: the value as text, and its mark
    notes: dict[str, str] = {}  # key that is simplified: in what way
    for group in ("", *GROUPS):  # in the order of config.yaml: later ones take precedence
        option = choices.get(group) if group else "config"
        text = read_first(folders, f"{group}/{option}.yaml".lstrip("/")) if option else None
        if text is not None:
            package = "" if "# @package _global_" in text or not group else f"{group}."
            new = {package + key: (value, mark) for key, value, mark in marked_values(text)}
            notes = {key: note for key, note in notes.items() if key not in new}
            notes |= {key.removeprefix("simplified."): new[key][0] for key in new if key.startswith("simplified.")}
            written |= new

    user_keys = {override.key_or_group for override in map(parse, overrides)} - {*GROUPS}  # task=copy sets no value

    def set_by_user(key: str) -> bool:
        return any(f"{key}.".startswith(f"{user_key}.") for user_key in user_keys)

    memory_keys: set[str] = set()  # those that the model takes, unless its own file marks what it takes
    values: dict[str, dict[str, Any]] = {source: {} for source in SOURCES.values()}
    for key, (text, mark) in sorted(written.items(), key=lambda item: item[0].startswith("memory.")):
        reference = re.fullmatch(r"\$\{(\w+\.\w+)\}", text)
        if set_by_user(key) or (reference and set_by_user(reference[1])) or not is_used(key, config, memory_keys):
            continue
        if reference and key.startswith("model.") and not mark:
            memory_keys.add(reference[1])
        if mark:
            value = OmegaConf.select(config, key)
            values[SOURCES[mark]][key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return {
        "value_sources": values,
        "simplifications": [note for key, note in notes.items() if not set_by_user(key)],
    }


def is_used(key: str, config: DictConfig, memory_keys: set[str]) -> bool:
    """Whether the run's figures depend on a key, by what its task, model and objective take."""
    section, _, name = key.partition(".")
    if section in NO_SOURCE or key in NO_SOURCE:
        return False
    if section == "memory":
        return key in memory_keys
    if section == "alpha_schedule" or name == "span_lr_factor":
        return "alpha" in config.model  # only these models learn spans
    if section == "actor_critic":
        acts = issubclass(get_class(config.task["_target_"]), RLTask)
        return acts and (name != "clip_coef" or config.actor_critic.update_epochs > 1)
    if name == "final_factor":
        return config.lr_schedule.final_updates > 0
    if name == "embedding_std":
        return config.transformer.cutoffs is None
    if name.startswith("curriculum_"):
        return any(key.startswith("initial_") and value is not None for key, value in config.task.items())
    return True


def marked_values(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Dotted key, value as it is written, and mark of every value of a YAML text."""
    lines = text.splitlines()
    throughout = THROUGHOUT.search(text)

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str, str | None]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, f"{prefix}.{key.value}" if prefix else key.value)
        else:
            mark = throughout or AT_END_OF_LINE.search(lines[node.start_mark.line])
            yield prefix, str(node.value), mark and mark[1]

    document = yaml.compose(text, Loader=yaml.SafeLoader)
    return walk(document, "") if document else iter(())


def read_first(folders: Sequence[str], name: str) -> str | None:
    """The first file of that name in Hydra's search order; None if there is none."""
    for folder in folders:
        scheme, _, path = folder.rpartition("://")
        root = files(path) if scheme == "pkg" else Path(path)
        try:
            return root.joinpath(name).read_text(encoding="utf-8")
        except (OSError, ModuleNotFoundError):
            continue
    return None
