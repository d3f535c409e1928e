"""Validation of the config: every key is known and has the type its reader declares, before any work starts."""

import inspect
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, Union, get_args, get_type_hints

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from torch import Tensor

from ...transformer import TransformerConfig
from ..logging.wandb_logger import check_wandb
from .former_names import current_name


@dataclass
class TopLevel:
    """The keys outside of all sections."""

    seed: int
    evaluate: str | None
    paper: dict[str, float]
    simplified: dict[str, str]


@dataclass
class MemoryConfig:
    """Keys of `memory`."""

    max_span: int
    ramp: float
    alpha: float
    init_span_ratio: float
    num_positions: int
    random_drop: bool


@dataclass
class LRScheduleConfig:
    """Keys of `lr_schedule`."""

    name: str
    warmup_updates: int
    final_updates: int
    final_factor: float
    span_lr_factor: float


@dataclass
class AlphaScheduleConfig:
    """Keys of `alpha_schedule`."""

    start_update: int
    warmup_updates: int


@dataclass
class TrainConfig:
    """Keys of `train`."""

    updates: int
    batch_size: int
    block_size: int
    grad_accumulation: int
    grad_clip: float | None
    curriculum_interval: int = 20  # folders of earlier runs do not have it


@dataclass
class ActorCriticConfig:
    """Keys of `actor_critic`."""

    discount: float
    gae_lambda: float
    entropy_coef: float
    final_entropy_coef: float
    value_coef: float
    clip_coef: float
    update_epochs: int
    normalize_advantage: bool


@dataclass
class EvalConfig:
    """Keys of `eval`."""

    interval: int | None
    splits: list[str]
    batch_size: int
    block_size: int
    max_blocks: int | None
    span_cap: int | None = None  # folders of earlier runs do not have it
    weights: str = "last"


@dataclass
class RunConfig:
    """Keys of `run`."""

    device: str
    precision: str
    compile: bool
    deterministic: bool
    num_threads: int | None
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    progress_bar: bool


@dataclass
class WandbConfig:
    """Keys of `wandb`."""

    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


SECTIONS = {
    "memory": MemoryConfig,
    "lr_schedule": LRScheduleConfig,
    "alpha_schedule": AlphaScheduleConfig,
    "train": TrainConfig,
    "actor_critic": ActorCriticConfig,
    "eval": EvalConfig,
    "run": RunConfig,
    "wandb": WandbConfig,
}
CHOICES = {
    "lr_schedule.name": ("constant", "cosine"),
    "eval.weights": ("last", "best"),
    "run.precision": ("float32", "bfloat16", "float64"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}
MINIMUM = {
    "seed": 0,
    "transformer.num_layers": 1,
    "transformer.hidden_size": 1,
    "transformer.feedforward_size": 1,
    "train.updates": 1,
    "train.batch_size": 1,
    "train.block_size": 1,
    "train.grad_accumulation": 1,
    "train.curriculum_interval": 1,
    "actor_critic.update_epochs": 1,
    "eval.batch_size": 1,
    "eval.block_size": 1,
    "eval.interval": 1,
    "eval.max_blocks": 1,
    "eval.span_cap": 1,
    "run.log_every": 1,
    "run.checkpoint_every": 1,
    "run.keep_checkpoints": 1,
    "run.num_threads": 1,
}


def validate(config: DictConfig) -> DictConfig:
    """The config with every interpolation resolved. Raises ValueError at the first key that is wrong."""
    try:
        config = DictConfig(OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        raise ValueError(f"{error.full_key}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value yet; give it one, as in {missing[0]}=VALUE")
    transformer_arguments = {argument.name: (argument.type, argument.default) for argument in fields(TransformerConfig)}
    del transformer_arguments["vocab_size"], transformer_arguments["num_classes"]  # these are the task's
    transformer_arguments = {"num_layers": (int, MISSING), **transformer_arguments}
    validate_section(config, "transformer", make_schema("transformer", transformer_arguments))
    for name, schema in SECTIONS.items():
        validate_section(config, name, schema)
    for name in ("task", "model", "optimizer"):
        validate_section(config, name, constructor_schema(name, config[name]))
    section_names = {"task", "model", "transformer", "optimizer", *SECTIONS}
    top_level = {key: value for key, value in config.items() if key not in section_names}
    validate_section(DictConfig({"": top_level}), "", TopLevel)
    for split in config.eval.splits:
        if split not in ("valid", "test"):
            raise ValueError(f"eval.splits may name valid and test, got {split}")
    for key, choices in CHOICES.items():
        if OmegaConf.select(config, key) not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {OmegaConf.select(config, key)}")
    for key, minimum in MINIMUM.items():
        value = OmegaConf.select(config, key)
        if value is not None and value < minimum:
            raise ValueError(f"{key} must be at least {minimum}, got {value}")
    check_wandb(config.wandb)
    return config


def validate_section(config: DictConfig, name: str, schema: type) -> None:
    """Raises ValueError for the first key of a section that is unknown, ill-typed or missing."""
    section = {key: value for key, value in config[name].items() if not key.startswith("_")}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), section)
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}".strip(".") if error.full_key else name
        if str(error.full_key) not in {key_field.name for key_field in fields(schema)}:
            if new_name := current_name(key):
                raise ValueError(f"{key} is called {new_name} since version 0.2") from None
            known = ", ".join(key_field.name for key_field in fields(schema))
            raise ValueError(f"{key} is not known; {name or 'the top level'} takes: {known}") from None
        if "is not a ListConfig" in first_line(error):
            raise ValueError(f"{key} must be a list, as in {key}=[{section.get(error.full_key)}]") from None
        raise ValueError(f"{key}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"{name}.{missing[0]} is needed; give it a value, as in +{name}.{missing[0]}=VALUE")


def constructor_schema(name: str, section: Any) -> type:
    """A dataclass of the arguments of the class that `section._target_` names, except an optimizer's parameters."""
    try:
        target = get_class(section["_target_"])
    except Exception:
        value = section.get("_target_") if isinstance(section, DictConfig) else section
        raise ValueError(f"{name}._target_ must name a class that can be imported, got {value}") from None
    hints = get_type_hints(target.__init__)  # type: ignore[misc]
    parameters = inspect.signature(target).parameters
    arguments = {
        key: (without_tensor(hints.get(key, Any)), parameter.default)
        for key, parameter in parameters.items()
        if key != "params"
    }
    return make_schema(name, arguments)


def without_tensor(annotation: Any) -> Any:
    """Drop Tensor from a union: torch.optim declares its rates as float | Tensor, which is a float in a config."""
    types = get_args(annotation)
    return Union[tuple(kind for kind in types if kind is not Tensor)] if Tensor in types else annotation  # noqa: UP007


def make_schema(name: str, arguments: dict[str, tuple[Any, Any]]) -> type:
    """A dataclass of name: (type, default). Types that a config cannot hold are left for the constructor to check."""
    schema_fields = []
    for key, (kind, default) in arguments.items():
        required = default in (MISSING, inspect.Parameter.empty)
        value = field(default_factory=partial(copy, "???" if required else default))
        try:
            OmegaConf.structured(make_dataclass(name, [(key, kind, value)]))
        except OmegaConfBaseException:
            kind = Any
        schema_fields.append((key, kind, value))
    return make_dataclass(name, schema_fields)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
