"""Which values of a run are not the paper's, read from the marks in the comments of the YAML files.

A comment with (c) marks our own choice and one with (r) a value of the authors' released code. A mark is for the keys
of its line, or, as "(c) throughout" above the first key, for all keys of the file except on lines with "the paper's".
Values that the user has set have no mark.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

GROUPS = ("task", "model", "size", "recipe", "experiment")  # in the order of config.yaml: later ones take precedence
SOURCES = {"(c)": "our choice", "(r)": "the authors' released code"}


def value_sources(
    config: DictConfig, choices: Mapping[str, str | None], folders: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """For a run's summary: the values that are not the paper's, by source, and the simplifications of its recipe.

    Args:
        choices: the option chosen in each config group.
        folders: where the group's files are searched: paths, or pkg://MODULE.
        overrides: those of the command line.
    """
    marks: dict[str, str | None] = {}
    simplifications = []
    for group in ("", *GROUPS):
        option = choices.get(group) if group else "config"
        text = read_first(folders, f"{group}/{option}.yaml".lstrip("/")) if option else None
        if text is not None:
            package = f"{group}." if group in ("task", "model") else ""
            marks |= {package + key: mark for key, mark in marked_keys(text)}
            if "implif" in header_comment(text):
                simplifications.append(header_comment(text).removeprefix("(c) throughout. "))
    overridden = {override.lstrip("+~").partition("=")[0] for override in overrides}
    values: dict[str, dict[str, Any]] = {source: {} for source in SOURCES.values()}
    for key, mark in marks.items():
        if mark and key not in overridden and (value := OmegaConf.select(config, key)) is not None:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            values[SOURCES[mark]][key] = plain
    return {"value_sources": values, "simplifications": simplifications}


def marked_keys(text: str) -> Iterator[tuple[str, str | None]]:
    """Every dotted key of a YAML text, with its mark."""
    lines = text.splitlines()
    throughout = next((mark for mark in SOURCES if f"{mark} throughout" in header_comment(text)), None)

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, f"{prefix}.{key.value}" if prefix else key.value)
        elif not prefix.startswith(("defaults", "hydra", "paper")) and not prefix.endswith("_target_"):
            comment = lines[node.start_mark.line].partition("#")[2]
            default_mark = None if "the paper's" in comment else throughout
            yield prefix, next((mark for mark in SOURCES if mark in comment), default_mark)

    document = yaml.compose(text, Loader=yaml.SafeLoader)
    return walk(document, "") if document else iter(())


def header_comment(text: str) -> str:
    """The comment above the first key, as one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(line for line in lines if not line.startswith("@package"))


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
