"""Learning rate and weight of the span loss, as functions of the update."""

import math

from omegaconf import DictConfig
from torch.optim import Optimizer


def lr_multiplier(update: int, num_updates: int, schedule: DictConfig) -> float:
    """Multiplier of the learning rate at an update, counted from 0.

    Linear warm-up, then constant or a half cosine down to 0. The last `final_updates` updates run at `final_factor`
    times the constant rate (section A.2.4: the last 10k updates on enwik8 at a tenth).
    """
    if update < schedule.warmup_updates:
        return (update + 1) / schedule.warmup_updates
    if update >= num_updates - schedule.final_updates:
        return schedule.final_factor
    if schedule.name == "cosine":
        cosine_updates = num_updates - schedule.final_updates - schedule.warmup_updates
        return (1 + math.cos(math.pi * (update - schedule.warmup_updates) / max(1, cosine_updates))) / 2
    return 1.0


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Set each parameter group's learning rate to a multiple of its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def alpha_multiplier(update: int, schedule: DictConfig) -> float:
    """Multiplier of the span loss: 0 before `start_update`, then growing linearly to 1 over `warmup_updates`."""
    if update < schedule.start_update:
        return 0.0
    return min(1.0, (update - schedule.start_update + 1) / max(1, schedule.warmup_updates))
