"""The folder .hydra of a run: its config, and how that was composed.

config.yaml      the config with all references resolved; what evaluate=RUN and resume=RUN start from
hydra.yaml       what Hydra has chosen: the options of all groups, the launcher
overrides.yaml   the overrides of the command line, as they were typed

A run folder may come from somebody else, so it is read as plain data: nothing in it is resolved, and no class is
imported but those of this package, of torch.optim and Gymnasium, and of the modules that the user trusts.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from ..config.overrides import is_below, literal, parse
from ..config.sections import add_new_keys
from .files import check_regular

SIZE_LIMIT = 2**20  # bytes; such a file has a few thousand
DEPTH_LIMIT = 20
TRUSTED = ("expire_span", "torch.optim", "gymnasium")
TRUST_VARIABLE = "EXPIRE_SPAN_TRUST"


class ConfigFiles(NamedTuple):
    """What the files of .hydra hold."""

    config: DictConfig
    hydra: dict[str, Any]
    overrides: list[str]

    def texts(self) -> dict[str, str]:
        """The files, as texts by their paths in the run folder."""
        nodes = {
            "config": OmegaConf.to_container(self.config, resolve=True),
            "hydra": {"hydra": self.hydra},
            "overrides": self.overrides,
        }
        dump = yaml.safe_dump
        return {f".hydra/{name}.yaml": dump(node, sort_keys=False, allow_unicode=True) for name, node in nodes.items()}


def load_config(folder: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a run, with all keys of this version.

    Args:
        folder: the run folder.
        overrides: of the command line; `task._target_=CLASS` trusts this class.

    Raises:
        FileNotFoundError: if this is not a run folder.
        ValueError: if a version before 0.2 wrote it, if it cannot be read, or if it names code that is not trusted.
    """
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has no .hydra/config.yaml, which a run writes once its checks have "
            f"passed; to start a run in it, give the command of that run with hydra.run.dir={folder}"
        )
    check_regular(folder)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no config, but {type(content).__name__}")
    if "optimiser" in content:
        raise ValueError(written_by_older_version(folder))
    restated = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    for key, value, names in named_code(content):
        is_named = key in restated and parse(restated[key]).value() == value
        if not is_named and not all(is_below(str(name), trusted_modules()) for name in names):
            raise ValueError(
                f"{key}={value} of {folder} is no part of expire-span, and would be imported; if you trust it, say so "
                f"by {key}={value} on the command line, or by {TRUST_VARIABLE}=MODULE in the environment"
            )
    return DictConfig(literal(add_new_keys(content)))


def named_code(content: dict[str, Any]) -> Iterator[tuple[str, Any, list[Any]]]:
    """The keys of a config that name code, their values, and the names in them that would be imported."""
    for section in ("task", "model", "optimizer"):
        target = content[section].get("_target_") if isinstance(content.get(section), dict) else None
        yield f"{section}._target_", target, [target]
    task: dict[str, Any] = content["task"] if isinstance(content.get("task"), dict) else {}
    if ":" in str(task.get("id")):  # MODULE:ID of Gymnasium
        yield "task.id", task["id"], [str(task["id"]).partition(":")[0]]
    if wrappers := task.get("wrappers"):
        each = wrappers if isinstance(wrappers, list) else [wrappers]
        yield "task.wrappers", wrappers, [item.get("_target_") if isinstance(item, dict) else item for item in each]


def load_config_files(folder: Path, overrides: Sequence[str] = ()) -> ConfigFiles:
    """The config of a run and how it was composed; raises what `load_config` raises."""
    config = load_config(folder, overrides)
    hydra, run_overrides = (read_yaml(folder / ".hydra" / f"{name}.yaml") for name in ("hydra", "overrides"))
    try:
        choices = hydra["hydra"]["runtime"]["choices"]
        if not isinstance(run_overrides, list) or not all(
            isinstance(text, str | None) for text in [*choices, *choices.values(), *run_overrides]
        ):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder}/.hydra is damaged: hydra.yaml or overrides.yaml is not as a run writes it"
        ) from None
    return ConfigFiles(config, hydra["hydra"], run_overrides)


def trusted_modules() -> list[str]:
    """Modules whose classes a run folder may name: ours, installed extensions, and those of EXPIRE_SPAN_TRUST."""
    extensions = [entry_point.value.partition(".")[0] for entry_point in entry_points(group="expire_span.conf")]
    return [*TRUSTED, *extensions, *filter(None, os.environ.get(TRUST_VARIABLE, "").split(","))]


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file. Raises ValueError for what is not, or is larger than such a file ever is."""
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > SIZE_LIMIT:
            raise ValueError(f"it has more than {SIZE_LIMIT:,} characters")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH_LIMIT:  # a few lines can stand for terabytes
                raise ValueError("it has aliases, or is nested too deeply")
        return yaml.safe_load(text)
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not the YAML that a run writes: {reason}") from None


def merge_overrides(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Both, without those of the first whose key the second has, too: the command that gives the same run at once."""
    keys = {parse(override).key_or_group for override in second}
    return [*(override for override in first if parse(override).key_or_group not in keys), *second]


def written_by_older_version(folder: Path) -> str:
    return (
        f"{folder} was written by expire-span 0.1, which had other names for settings and weights; "
        "open it with that version (git checkout a0984c4), or train it again"
    )
