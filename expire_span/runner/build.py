"""From a checked config to the things that it names."""

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.optim import Optimizer

from ..kernels import operator
from ..transformer import Transformer, TransformerConfig


def prepare(config: DictConfig) -> torch.device:
    """Seeds, threads, determinism; the device that the run uses."""
    run = config.run
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(run.deterministic)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.manual_seed(config.seed)
    device = pick_device(run.device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Use freed memory again instead of handing it back, where there is a glibc.

    Else a large tensor on a CPU costs a page fault for every 4 kB of it, each time that one is made.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing gets pages of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: none goes back


def pick_device(name: str) -> torch.device:
    """cuda, mps or cpu, or a device by its own name. Raises ValueError where there is none of that name."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there.get(name.split(":")[0], False):
        available = ", ".join(kind for kind, yes in there.items() if yes)
        raise ValueError(f"run.device={name} is not on this machine; there is: {available}, or auto to take the first")
    return torch.device(name)


def build_model(config: DictConfig, task: Any, device: torch.device) -> Transformer:
    """The config's Transformer for a task, in float64 or, as autocast wants its weights too, float32."""
    sizes = {key: value for key, value in config.transformer.items() if key != "layers"}
    shape = TransformerConfig(vocabulary=task.vocabulary, classes=task.classes, **sizes)
    dtype = torch.float64 if config.run.precision == "float64" else torch.float32
    operator.form(shape.kernel, device.type, dtype)  # refused, or compiled, before a clock runs
    memory = [instantiate(config.model) for _ in range(config.transformer.layers)]
    return Transformer(shape, memory).to(device, dtype)


def build_optimiser(config: DictConfig, model: Transformer) -> Optimizer:
    """The config's optimiser; the spans' own parameters are a group with their own rate."""
    spans = [parameter for mechanism in model.mechanisms for parameter in mechanism.parameters()]
    others = [parameter for parameter in model.parameters() if all(parameter is not span for span in spans)]
    rate = config.optimiser.lr
    groups = [{"params": others, "lr": rate}]
    if spans:
        groups.append({"params": spans, "lr": rate * config.schedule.span_factor})
    optimiser = instantiate(config.optimiser, groups)
    for group in optimiser.param_groups:
        group["full_lr"] = group["lr"]
    return optimiser


def precision(config: DictConfig, device: torch.device) -> AbstractContextManager:
    """What the forward pass runs under."""
    if config.run.precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
