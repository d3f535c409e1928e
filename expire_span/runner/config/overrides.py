"""The overrides of a command line: read by Hydra's own parser, also where they change the config of an earlier run."""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

NAMES = ("evaluate", "resume", "task.path", "wandb.project", "wandb.entity", "wandb.group")  # keys of names and paths
GROUPS = ("task", "model", "size", "recipe", "experiment")


def is_override(argument: str) -> bool:
    """Whether an argument of the command line is an override, and not a flag."""
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def parse(override: str) -> Override:
    """Raises ValueError for what is not KEY=VALUE in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(override)
    except Exception as error:  # the lexer raises several kinds
        reason = str(error).splitlines()[0].partition("See https")[0].strip()
        raise ValueError(f"{override} cannot be read ({reason}); quote the value, as in \"KEY='VALUE'\"") from None


def quote(text: str) -> str:
    """A value that Hydra reads as exactly this text, whatever characters it has."""
    text = re.sub(r"\\*(?='|$)", lambda match: match[0] * 2, text).replace("'", r"\'")  # \ escapes only before a quote
    return "'" + text.replace("${", r"\${") + "'"


def quote_text(override: str) -> str:
    """Quote the value of an override that is a text but would be read as something else.

    That is a path that begins with ~, the name of a run folder that exists, or a name that looks like a number: 12e4.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    is_run = name in ("evaluate", "resume") and os.path.exists(value) and not re.fullmatch(r"[\w./+-]+", value)
    is_number = name in NAMES and re.fullmatch(r"[+-]?(\d[\w.+-]*|\.\d+|nan|inf)|true|false", value, re.IGNORECASE)
    if equals and (is_run or is_number or re.match(r"~\w*(/|$)", value)):
        return f"{key}={quote(str(Path(value).expanduser()))}"
    return override


def apply_overrides(config: DictConfig, overrides: Sequence[str], action: str, changeable: Sequence[str]) -> None:
    """Change the config of an earlier run by the command line.

    Args:
        config: the run's config, changed in place.
        overrides: as they were typed.
        action: evaluate or resume, which names the run.
        changeable: the sections and keys that may change.

    Raises:
        ValueError: for another task or model, for a key that the run does not have, or for one that may not change.
    """
    for text in overrides:
        override = parse(text)
        key = override.key_or_group
        if key == action:
            continue
        if key in GROUPS:
            raise ValueError(f"{action}=RUN takes {key} from the run itself; omit {text.lstrip('+')}")
        if OmegaConf.select(config, key, default=text, throw_on_missing=False) is text:
            raise ValueError(f"{key} is not in the config of the run that {action}=RUN names (its .hydra/config.yaml)")
        if override.is_delete() or override.is_sweep_override():
            raise ValueError(f"{action}=RUN takes KEY=VALUE, one value each, got {text}")
        if not is_below(key, changeable) and override.value() != OmegaConf.select(config, key):
            advice = "; eval.span_cap caps every span (figure 10)" if key.endswith(".max_span") else ""
            raise ValueError(f"{action}=RUN keeps the run's own {key}; omit {text.lstrip('+')}{advice}")
        OmegaConf.update(config, key, override.value())


def is_below(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or lies in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def literal(node: Any) -> Any:
    """The same data with every ${ escaped, so that OmegaConf takes it as text."""
    if isinstance(node, dict):
        return {key: literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return [literal(value) for value in node]
    return node.replace("${", r"\${") if isinstance(node, str) else node


def sweep_folder_name(overrides: Sequence[str]) -> str | None:
    """The value of hydra.sweep.subdir that tells the jobs of a sweep apart by the swept values; None if none is."""
    swept = [parsed.key_or_group for parsed in map(parse, overrides) if parsed.is_sweep_override()]
    swept = [key for key in swept if not key.startswith("hydra")]
    if not swept:
        return None
    names = ["${hydra:runtime.choices.task}", "${hydra:runtime.choices.model}", "seed${seed}"]
    if "evaluate" in swept:
        names = ["evaluate"]
    for key in swept:
        if key in ("size", "recipe", "experiment"):
            names.append(f"${{file_name:${{hydra:runtime.choices.{key}}}}}")
        elif key not in ("task", "model", "seed"):
            names.append(f"{'' if key == 'evaluate' else key.rpartition('.')[2] + '='}${{file_name:${{{key}}}}}")
    return "-".join(names)


def file_name(value: object) -> str:
    """A name for a value that any file system takes, with a hash where characters are left out."""
    text = str(value)
    name = re.sub(r"[^\w.+=,-]+", "_", text)
    if name == text and len(name) <= 60:
        return name
    return f"{name[-50:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def free_folder(path: str) -> str:
    """Make the folder; if it exists already, one with a number behind its name. Two starts never share one."""
    number, folder = 1, path
    while True:
        missing = missing_folders(folder)
        try:
            os.makedirs(folder)
            new_folders.extend(missing)
            return folder
        except FileExistsError:
            number += 1
            folder = f"{path}-{number}"


new_folders: list[Path] = []  # that are made by this start


def missing_folders(path: str) -> list[Path]:
    """A folder and the folders above it, as far as they do not exist."""
    absolute = Path(path).absolute()
    return [folder for folder in (absolute, *absolute.parents) if not folder.exists()]


def remove_empty_new_folders() -> None:
    """Remove the folders that this start has made and left empty, because it was refused."""
    for folder in sorted(new_folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            if os.listdir(folder) == ["multirun.yaml"]:  # which Hydra writes before it composes the jobs of a sweep
                (folder / "multirun.yaml").unlink()
            folder.rmdir()


OmegaConf.register_new_resolver("file_name", file_name, replace=True)
OmegaConf.register_new_resolver("free_folder", free_folder, replace=True, use_cache=True)
