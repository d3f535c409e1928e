"""What changes with the update: the learning rate, and the weight of the span loss."""

import math

from omegaconf import DictConfig
from torch.optim import Optimizer


def rate_factor(update: int, updates: int, schedule: DictConfig) -> float:
    """What the learning rate is multiplied by at an update, counted from 0.

    Linear warm-up; then constant, or half a cosine down to 0 at the end. The last `final_updates` run at the constant
    rate times `final_factor` (section 6: enwik8's last 10k at a tenth).
    """
    if update < schedule.warmup:
        return (update + 1) / schedule.warmup
    if update >= updates - schedule.final_updates:
        return schedule.final_factor
    if schedule.shape == "cosine":
        share = (update - schedule.warmup) / max(1, updates - schedule.final_updates - schedule.warmup)
        return (1 + math.cos(math.pi * share)) / 2
    return 1.0


def set_rates(optimiser: Optimizer, factor: float) -> None:
    """Each group's own rate, which it was made with, times the factor."""
    for group in optimiser.param_groups:
        group["lr"] = group["full_lr"] * factor


def alpha_factor(update: int, schedule: DictConfig) -> float:
    """What the span loss is multiplied by: 0 until `alpha_start`, then growing to 1 over `alpha_warmup` updates."""
    if update < schedule.alpha_start:
        return 0.0
    return min(1.0, (update - schedule.alpha_start + 1) / max(1, schedule.alpha_warmup))
