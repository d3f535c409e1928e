"""Which values of a run are not the paper's: read from the marks in the YAML files, where they stand.

A comment with (c) marks our own choice, one with (r) what the authors' released code has: for the keys of its line, or,
as "(c) throughout" above the first key, for all of the file but lines with "the paper's". What a user has set is nobody
else's choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

ORDER = ("task", "model", "size", "setting", "experiment")  # as in config.yaml: the last to set a key decides
SOURCES = {"(c)": "our choice", "(r)": "the authors' released code"}


def marked(
    config: DictConfig, choices: Mapping[str, str | None], folders: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """For a run's summary: the values that each source has given, and what its setting simplifies.

    choices: the option of each group (a key without one has null); folders: where they are looked for, a path or
    pkg://MODULE; overrides: of the command line.
    """
    marks: dict[str, str | None] = {}
    notes = []
    for group in ("", *ORDER):
        option = choices.get(group) if group else "config"
        text = read(folders, f"{group}/{option}.yaml".lstrip("/")) if option else None
        if text is not None:
            package = f"{group}." if group in ("task", "model") else ""
            marks |= {package + key: mark for key, mark in marks_of(text)}
            if "implif" in above(text):
                notes.append(above(text).removeprefix("(c) throughout. "))
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    values: dict[str, dict[str, Any]] = {name: {} for name in SOURCES.values()}
    for key, mark in marks.items():
        if mark and key not in given and (value := OmegaConf.select(config, key)) is not None:
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            values[SOURCES[mark]][key] = plain
    return {"choices": values, "simplifications": notes}


def marks_of(text: str) -> Iterator[tuple[str, str | None]]:
    """Every key of a YAML text, dotted, and its mark."""
    lines = text.splitlines()
    throughout = next((mark for mark in SOURCES if f"{mark} throughout" in above(text)), None)

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str | None]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield from walk(value, f"{prefix}.{key.value}" if prefix else key.value)
        elif not prefix.startswith(("defaults", "hydra")) and not prefix.endswith("_target_"):
            comment = lines[node.start_mark.line].partition("#")[2]
            otherwise = None if "the paper's" in comment else throughout
            yield prefix, next((mark for mark in SOURCES if mark in comment), otherwise)

    document = yaml.compose(text, Loader=yaml.SafeLoader)
    return walk(document, "") if document else iter(())


def above(text: str) -> str:
    """The comment above the first key, in one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(line for line in lines if not line.startswith("@package"))


def read(folders: Sequence[str], name: str) -> str | None:
    """The first file of that name, as Hydra searches; None where there is none."""
    for folder in folders:
        scheme, _, path = folder.rpartition("://")
        root = files(path) if scheme == "pkg" else Path(path)
        try:
            return root.joinpath(name).read_text(encoding="utf-8")
        except (OSError, ModuleNotFoundError):
            continue
    return None
