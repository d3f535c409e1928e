"""Validation of the config: every key is known and has the type its reader declares, before any work starts."""

import inspect
import math
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from torch import Tensor
from torch.optim import Optimizer

from expire_span.tasks.base import RLTask, Task

from ...memory import Mechanism
from ...transformer import TransformerConfig
from ..eviction import check_eviction
from ..logging.trackers import check_trackers
from .former_names import current_name
from .overrides import literal
from .sections import SECTIONS, TopLevel, add_new_keys

CHOICES = {
    "lr_schedule.name": ("constant", "cosine"),
    "eval.weights": ("last", "best"),
    "run.precision": ("auto", "float32", "bfloat16", "float64"),
    "run.compile": ("auto", True, False),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}
LIMIT = 2**48  # of every integer: beyond it tensors of 64-bit integers overflow
BOUNDS = {  # the smallest and the largest value
    "seed": (0, 2**63 - 1),
    "task.seed": (0, 2**63 - 1),
    "memory.max_span": (1, LIMIT),
    "memory.alpha": (0, math.inf),
    "memory.init_span_ratio": (0, 1),
    "memory.num_positions": (0, LIMIT),
    "transformer.num_layers": (1, 1000),
    "transformer.hidden_size": (1, LIMIT),
    "transformer.num_heads": (1, LIMIT),
    "transformer.feedforward_size": (1, LIMIT),
    "optimizer.lr": (0, math.inf),
    "lr_schedule.warmup_updates": (0, LIMIT),
    "lr_schedule.final_updates": (0, LIMIT),
    "lr_schedule.final_factor": (0, math.inf),
    "lr_schedule.span_lr_factor": (0, math.inf),
    "alpha_schedule.start_update": (0, LIMIT),
    "alpha_schedule.warmup_updates": (0, LIMIT),
    "train.updates": (1, LIMIT),
    "train.batch_size": (1, LIMIT),
    "train.block_size": (1, LIMIT),
    "train.grad_accumulation": (1, LIMIT),
    "train.curriculum_interval": (1, LIMIT),
    "actor_critic.discount": (0, 1),
    "actor_critic.gae_lambda": (0, 1),
    "actor_critic.entropy_coef": (0, math.inf),
    "actor_critic.final_entropy_coef": (0, math.inf),
    "actor_critic.value_coef": (0, math.inf),
    "actor_critic.update_epochs": (1, LIMIT),
    "eval.batch_size": (1, LIMIT),
    "eval.block_size": (1, LIMIT),
    "eval.interval": (1, LIMIT),
    "eval.max_blocks": (1, LIMIT),
    "eval.span_cap": (1, LIMIT),
    "eval.num_kept": (1, LIMIT),
    "run.log_every": (1, LIMIT),
    "run.checkpoint_every": (1, LIMIT),
    "run.keep_checkpoints": (1, LIMIT),
    "run.num_threads": (1, 1024),
    "run.rank_timeout": (0, 1e6),
}
POSITIVE = ("memory.ramp", "memory.budget", "train.grad_clip", "actor_critic.clip_coef", "run.rank_timeout")  # above 0
TARGETS = re.compile(r"(task|model|optimizer)\._target_|task\.wrappers\.\d+\._target_")  # the only keys of Hydra's own
BASE_CLASSES = {"task": (Task, RLTask), "model": (Mechanism,), "optimizer": (Optimizer,)}


def validate(config: DictConfig) -> DictConfig:
    """The config with every reference resolved and every value converted to the type that its reader declares.

    Raises:
        ValueError: at the first key that is wrong.
    """
    try:
        config = DictConfig(add_new_keys(literal(OmegaConf.to_container(config, resolve=True))))
    except InterpolationResolutionError as error:
        raise ValueError(f"{error.full_key}: {first_line(error)}") from None
    except RecursionError:
        raise ValueError("the config is nested too deeply, or refers to itself") from None
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{missing[0]} has no value yet; give it one, as in {missing[0]}=VALUE")
    schemas = {"transformer": transformer_schema(), **SECTIONS}
    for name in (*schemas, *BASE_CLASSES):
        if not isinstance(config.get(name), DictConfig):
            raise ValueError(f"{name} must be a section of keys, got {config.get(name)}; {name}.KEY=VALUE sets one")
    check_plain(config)
    schemas |= {name: constructor_schema(name, config[name]) for name in BASE_CLASSES}
    for name, schema in schemas.items():
        config[name] = converted_section(config, name, schema)
    plain: Any = OmegaConf.to_container(config)
    top_level = DictConfig({"": {key: value for key, value in plain.items() if key not in schemas}})
    config.update(converted_section(top_level, "", TopLevel))
    check_values(config)
    return config


def check_plain(config: DictConfig) -> None:
    """Raises ValueError for a key that Hydra would act on, or a number that is none or that no reader can hold."""

    def check(node: Any, key: str) -> None:
        if isinstance(node, dict | list):
            for name, value in node.items() if isinstance(node, dict) else enumerate(node):
                below = f"{key}.{name}" if key else str(name)
                if str(name).startswith("_") and not TARGETS.fullmatch(below):
                    raise ValueError(f"{below} is not allowed: the config gives values, it does not call anything else")
                check(value, below)
        elif isinstance(node, float) and not math.isfinite(node):
            raise ValueError(f"{key} must be a finite number, got {node}")
        elif isinstance(node, int) and abs(node) > LIMIT and not key.endswith("seed"):
            raise ValueError(f"{key} must not be beyond {LIMIT:,}, got {node}")

    check(OmegaConf.to_container(config), "")


def check_values(config: DictConfig) -> None:
    """Raises ValueError for a value that is not one of its choices, or out of its bounds."""
    for split in config.eval.splits:
        if split not in ("valid", "test"):
            raise ValueError(f"eval.splits may name valid and test, got {split}")
    for key, choices in CHOICES.items():
        if OmegaConf.select(config, key) not in choices:
            names = ", ".join(str(choice).lower() for choice in choices)
            raise ValueError(f"{key} must be one of {names}, got {OmegaConf.select(config, key)}")
    for key, (minimum, maximum) in BOUNDS.items():
        value = OmegaConf.select(config, key)
        if value is not None and value < minimum:
            raise ValueError(f"{key} must be at least {minimum}, got {value}")
        if value is not None and value > maximum:
            raise ValueError(f"{key} must be at most {maximum}, got {value}")
    for key in POSITIVE:
        value = OmegaConf.select(config, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key} must be above 0, got {value}")
    for percent in config.milestones:
        if not 0 < percent <= 100:
            raise ValueError(f"milestones.{percent} must be a percentage of the updates, above 0 and at most 100")
    micro_batch_size = config.train.micro_batch_size
    if not (micro_batch_size in (None, "auto") or (isinstance(micro_batch_size, int) and micro_batch_size > 0)):
        raise ValueError(f"train.micro_batch_size must be null, auto or a number of streams, got {micro_batch_size}")
    for key in ("hidden_size", "num_heads"):
        if config.model.get(key, config.transformer[key]) != config.transformer[key]:
            raise ValueError(f"model.{key}={config.model[key]} must be transformer.{key}={config.transformer[key]}")
    check_budget(config)
    check_eviction(config)
    schedule, updates = config.lr_schedule, config.train.updates
    if schedule.final_updates and schedule.warmup_updates + schedule.final_updates > updates:
        raise ValueError(
            f"train.updates={updates} is less than lr_schedule.warmup_updates={schedule.warmup_updates} and "
            f"lr_schedule.final_updates={schedule.final_updates} together, so that the learning rate would never be "
            "whole; for a short trial add lr_schedule.final_updates=0"
        )
    check_trackers(config)


def check_budget(config: DictConfig) -> None:
    """Raises ValueError for a memory budget of a model whose memory is fixed, or one that no alpha could reach."""
    budget, model = config.memory.budget, config.model
    if budget is None:
        return
    if "alpha" not in model:
        kind = model["_target_"].rpartition(".")[2]
        raise ValueError(
            f"memory.budget={budget:g} moves alpha, which {kind} does not have, so that nothing would move its memory"
        )
    if not model.alpha:
        raise ValueError(f"memory.budget={budget:g} needs a model.alpha above 0 to begin with, got {model.alpha}")
    if budget <= model.get("ramp", 0):
        raise ValueError(
            f"memory.budget={budget:g} must be above model.ramp={model.ramp:g}: even with a span of 0 a memory takes "
            "as many timesteps to fade"
        )


def converted_section(config: DictConfig, name: str, schema: type) -> DictConfig:
    """A section with its values converted. Raises ValueError for a key that is unknown, ill-typed or missing."""
    plain: Any = OmegaConf.to_container(config[name])
    target = {key: value for key, value in plain.items() if key == "_target_"}
    section = {key: value for key, value in plain.items() if key not in target}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), section)
    except OmegaConfBaseException as error:
        key = f"{name}.{error.full_key}".strip(".") if error.full_key else name
        known = [key_field.name for key_field in fields(schema)]
        if str(error.full_key).partition("[")[0].partition(".")[0] not in known:
            if new_name := current_name(key):
                raise ValueError(f"{key} is called {new_name} since version 0.2") from None
            raise ValueError(f"{key} is not known; {name or 'the top level'} takes: {', '.join(known)}") from None
        if "is not a ListConfig" in first_line(error) or "to ListConfig" in first_line(error):
            raise ValueError(f"{key} must be a list, as in {key}=[{section.get(error.full_key)}]") from None
        raise ValueError(f"{key}: {first_line(error)}") from None
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        key = f"{name}.{missing[0]}".strip(".")
        raise ValueError(f"{key} is needed; give it a value, as in +{key}=VALUE")
    values: Any = OmegaConf.to_container(merged)
    return DictConfig(target | {key: values[key] for key in section})


def transformer_schema() -> type:
    """The keys of `transformer`: the arguments of TransformerConfig, without those that the task gives."""
    arguments = {argument.name: (argument.type, argument.default) for argument in fields(TransformerConfig)}
    del arguments["vocab_size"], arguments["num_classes"]
    return make_schema("transformer", {"num_layers": (int, MISSING), **arguments})


def constructor_schema(name: str, section: DictConfig) -> type:
    """A dataclass of the arguments of the class that `section._target_` names, except an optimizer's parameters."""
    try:
        target = get_class(section["_target_"])
    except Exception:
        raise ValueError(
            f"{name}._target_ must name a class that can be imported, got {section.get('_target_')}"
        ) from None
    if not issubclass(target, BASE_CLASSES[name]):
        bases = " or ".join(f"{base.__module__}.{base.__name__}" for base in BASE_CLASSES[name])
        raise ValueError(f"{name}._target_={section['_target_']} must be a subclass of {bases}")
    hints = get_type_hints(target.__init__)
    parameters = inspect.signature(target).parameters
    arguments = {
        key: (hints.get(key, Any), parameter.default) for key, parameter in parameters.items() if key != "params"
    }
    return make_schema(name, arguments)


def config_type(annotation: Any) -> Any:
    """The type that a config can hold: without tensors and paths, and with lists in place of other sequences."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Path:
        return str
    if origin in (Union, UnionType):
        kinds = dict.fromkeys(config_type(kind) for kind in arguments if kind is not Tensor)
        return Union[tuple(kinds)]  # noqa: UP007
    if origin in (list, tuple, Sequence):
        return list[config_type(arguments[0])]  # type: ignore[misc]
    return type(arguments[0]) if origin is Literal else annotation


def make_schema(name: str, arguments: dict[str, tuple[Any, Any]]) -> type:
    """A dataclass of name: (type, default). Types that a config cannot hold are left for the constructor to check."""
    schema_fields = []
    for key, (kind, default) in arguments.items():
        kind = config_type(kind)
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
