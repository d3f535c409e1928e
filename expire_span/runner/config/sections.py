"""The keys of the config and their types, but for those of sections that mirror the arguments of a constructor."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

# A key has a default if there are run folders of before it was added, see `add_new_keys`.


@dataclass
class TopLevel:
    """The keys outside of all sections."""

    seed: int
    evaluate: str | None
    resume: str | None
    paper: dict[str, float]
    simplified: dict[str, str]
    tracker: Any = "wandb"  # or a list
    milestones: dict[int, float] = field(default_factory=dict)


@dataclass
class MemoryConfig:
    """Keys of `memory`."""

    max_span: int
    ramp: float
    alpha: float
    init_span_ratio: float
    num_positions: int
    random_drop: bool
    budget: float | None = None


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
    curriculum_interval: int = 20
    micro_batch_size: int | str | None = None
    offload_memory: bool = False


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
    bootstrap_truncated: bool = False


@dataclass
class EvalConfig:
    """Keys of `eval`."""

    interval: int | None
    splits: list[str]
    batch_size: int
    block_size: int
    max_blocks: int | None
    span_cap: int | None = None
    eviction: str | None = None
    num_kept: int | None = None
    weights: str = "last"


@dataclass
class RunConfig:
    """Keys of `run`."""

    device: str
    precision: str
    compile: bool | str
    deterministic: bool
    num_threads: int | None
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    progress_bar: bool
    profile: bool = False
    checkpoint_memories: bool = True
    rank_timeout: float = 60.0


@dataclass
class WandbConfig:
    """Keys of `wandb`."""

    mode: str
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    log_model: bool | str = False


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


def add_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that the config of an earlier run lacks, with the values that it was run with, and return it."""
    for name, schema in {"": TopLevel, **SECTIONS}.items():
        section: Any = config.get(name) if name else config
        defaults: Any = OmegaConf.to_container(OmegaConf.structured(schema))
        for key, value in defaults.items() if isinstance(section, dict) else ():
            if value != "???":  # those without a default were always there
                section.setdefault(key, value)
    return config
