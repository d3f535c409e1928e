"""The door: every key of the config is known and has the type that its reader declares, before any work starts."""

import inspect
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, Union, get_args, get_type_hints

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from torch import Tensor

from ..transformer import TransformerConfig


@dataclass
class Top:
    """What stands in no section."""

    seed: int
    evaluate: str | None
    splits: list[str]


@dataclass
class Memory:
    max_span: int
    ramp: float
    alpha: float
    init: float
    positions: int
    random_drop: bool


@dataclass
class Schedule:
    warmup: int
    shape: str
    final_updates: int
    final_factor: float
    span_factor: float
    alpha_start: int
    alpha_warmup: int


@dataclass
class Train:
    updates: int
    batch: int
    block: int
    accumulate: int
    clip: float | None


@dataclass
class ActorCritic:
    discount: float
    trace: float
    entropy: float
    final_entropy: float
    value: float
    ratio_clip: float
    epochs: int
    normalise: bool


@dataclass
class Evaluation:
    every: int | None
    batch: int
    block: int
    blocks: int | None


@dataclass
class Run:
    device: str
    precision: str
    compile: bool
    deterministic: bool
    threads: int | None
    log_every: int
    checkpoint_every: int
    progress: bool


@dataclass
class Wandb:
    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


SECTIONS = {
    "memory": Memory,
    "schedule": Schedule,
    "train": Train,
    "actor_critic": ActorCritic,
    "evaluation": Evaluation,
    "run": Run,
    "wandb": Wandb,
}
CHOICES = {
    "schedule.shape": ("constant", "cosine"),
    "run.precision": ("float32", "bfloat16", "float64"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}
AT_LEAST = {
    "seed": 0,
    "transformer.layers": 1,
    "transformer.hidden_size": 1,
    "transformer.feedforward_size": 1,
    "train.updates": 1,
    "train.batch": 1,
    "train.block": 1,
    "train.accumulate": 1,
    "actor_critic.epochs": 1,
    "evaluation.batch": 1,
    "evaluation.block": 1,
    "evaluation.every": 1,
    "evaluation.blocks": 1,
    "run.log_every": 1,
    "run.checkpoint_every": 1,
    "run.threads": 1,
}


def checked(config: DictConfig) -> DictConfig:
    """The config with every interpolation resolved. Raises ValueError at the first key that is not right."""
    try:
        config = DictConfig(OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        raise ValueError(f"{error.full_key}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value yet; give it one, as in {missing[0]}=VALUE")
    shape = {each.name: (each.type, each.default) for each in fields(TransformerConfig)}
    del shape["vocabulary"], shape["classes"]  # the task's
    compare(config, "transformer", make_schema("transformer", {"layers": (int, MISSING), **shape}))
    for name, schema in SECTIONS.items():
        compare(config, name, schema)
    for name in ("task", "model", "optimiser"):
        compare(config, name, signature_schema(name, config[name]))
    sections = {"task", "model", "transformer", "optimiser", *SECTIONS}
    compare(DictConfig({"": {key: value for key, value in config.items() if key not in sections}}), "", Top)
    for split in config.splits:
        if split not in ("valid", "test"):
            raise ValueError(f"splits may name valid and test, got {split}")
    for key, choices in CHOICES.items():
        if OmegaConf.select(config, key) not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {OmegaConf.select(config, key)}")
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key} must be at least {least}, got {value}")
    return config


def compare(config: DictConfig, name: str, schema: type) -> None:
    section = {key: value for key, value in config[name].items() if not key.startswith("_")}
    try:
        filled = OmegaConf.merge(OmegaConf.structured(schema), section)
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}".strip(".") if error.full_key else name
        if str(error.full_key) not in {each.name for each in fields(schema)}:
            known = ", ".join(each.name for each in fields(schema))
            raise ValueError(f"{key} is not known; {name or 'beside the sections it'} takes: {known}") from None
        if "is not a ListConfig" in first_line(error):
            raise ValueError(f"{key} must be a list, as in {key}=[{section.get(error.full_key)}]") from None
        raise ValueError(f"{key}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(filled))
    if missing:
        raise ValueError(f"{name}.{missing[0]} is needed; give it a value, as in +{name}.{missing[0]}=VALUE")


def signature_schema(name: str, section: Any) -> type:
    """A dataclass of the constructor's arguments that `section._target_` names, but for an optimiser's parameters."""
    try:
        target = get_class(section["_target_"])
    except Exception:
        given = section.get("_target_") if isinstance(section, DictConfig) else section
        raise ValueError(f"{name}._target_ must name a class that can be imported, got {given}") from None
    hints = get_type_hints(target.__init__)  # type: ignore[misc]
    parameters = inspect.signature(target).parameters
    arguments = {key: (hints.get(key, Any), each.default) for key, each in parameters.items() if key != "params"}
    return make_schema(name, {key: (without_tensor(kind), default) for key, (kind, default) in arguments.items()})


def without_tensor(kind: Any) -> Any:
    """float | Tensor, as torch.optim declares its rates, is a float in a config."""
    return Union[tuple(each for each in get_args(kind) if each is not Tensor)] if Tensor in get_args(kind) else kind  # noqa: UP007


def make_schema(name: str, arguments: dict[str, tuple[Any, Any]]) -> type:
    """A dataclass of name: (type, default). Where a config cannot hold the type its constructor is left to judge."""
    made = []
    for key, (kind, default) in arguments.items():
        needed = default in (MISSING, inspect.Parameter.empty)
        value = field(default_factory=partial(copy, "???" if needed else default))
        try:
            OmegaConf.structured(make_dataclass(name, [(key, kind, value)]))
        except OmegaConfBaseException:
            kind = Any
        made.append((key, kind, value))
    return make_dataclass(name, made)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
