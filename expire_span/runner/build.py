"""Build what a validated config names: device, model, optimizer, precision."""

import ctypes
import inspect
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch.optim import Optimizer

from ..kernels.dispatch import select_backend
from ..transformer import Transformer, TransformerConfig
from .ranks import world_size


def setup_runtime(config: DictConfig) -> torch.device:
    """Set seed, threads and determinism, replace what the config leaves to the device, and return the device."""
    run = config.run
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if run.deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports all of torch.compile
        torch.use_deterministic_algorithms(run.deterministic)
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    torch.manual_seed(config.seed)
    device = select_device(run.device)
    if device.type == "cpu":
        keep_freed_memory()
    resolve_auto(config, device)
    return device


def resolve_auto(config: DictConfig, device: torch.device) -> None:
    """Replace `run.precision=auto` and `run.compile=auto`, so that all that is saved tells what they have become.

    On a GPU that multiplies bfloat16 these are autocast and, where the Triton kernels can run, compilation; anywhere
    else float32 and no compilation.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.run.precision == "auto":
        config.run.precision = "bfloat16" if has_bfloat16 else "float32"
    if config.run.compile == "auto":
        backend = config.transformer.attention_backend
        config.run.compile = has_bfloat16 and select_backend(backend, device.type, torch.float32) == "triton"


def keep_freed_memory() -> None:
    """Let glibc, where it is used, keep freed memory for reuse instead of returning it to the system.

    Otherwise each new large CPU tensor costs a page fault for every 4 kB.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: freed memory is never returned


def select_device(name: str) -> torch.device:
    """cuda, mps, cpu or a numbered device; auto takes the first available. Raises ValueError for an unavailable one."""
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, yes in is_available.items() if yes]
    if name == "auto":
        name = available[0]
    if world_size() > 1 and ":" in name:
        raise ValueError(f"run.device={name} is one device for {world_size()} processes; use run.device=cuda")
    if name == "cuda" and world_size() > 1 and not has_own_gpu():
        name, num_gpus = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.cuda.device_count()
        if int(name.split(":")[1]) >= num_gpus:
            raise ValueError(f"there are {num_gpus} GPUs for more processes than these; start one process for each GPU")
        torch.cuda.set_device(name)
    if name.split(":")[0] not in available:
        raise ValueError(f"run.device={name} is not available here; use one of {', '.join(available)}, or auto")
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:  # such as a number that no device has
        raise ValueError(f"run.device={name} is not available here ({str(error).splitlines()[0]})") from None


def has_own_gpu() -> bool:
    """Whether a task of a Slurm job sees its own GPU alone."""
    return "SUBMITIT_EXECUTOR" in os.environ and torch.cuda.device_count() == 1


def build_model(config: DictConfig, task: Any, device: torch.device) -> Transformer:
    """The config's Transformer for a task, with float32 weights (also under bfloat16 autocast) or float64 ones."""
    sizes = {key: value for key, value in config.transformer.items() if key != "num_layers"}
    transformer_config = TransformerConfig(vocab_size=task.vocab_size, num_classes=task.num_classes, **sizes)
    dtype = torch.float64 if config.run.precision == "float64" else torch.float32
    # Refuse or compile the attention backend now, before any step is timed.
    select_backend(transformer_config.attention_backend, device.type, dtype)
    mechanisms = [instantiate(config.model) for _ in range(config.transformer.num_layers)]
    for block_size in (config.train.block_size, config.eval.block_size):
        mechanisms[0].check_block_size(block_size)
    return Transformer(transformer_config, mechanisms).to(device, dtype)


def build_optimizer(config: DictConfig, model: Transformer) -> Optimizer:
    """The config's optimizer; the span parameters are a group with their own learning rate."""
    span_parameters = [parameter for mechanism in model.mechanisms for parameter in mechanism.parameters()]
    span_ids = {id(parameter) for parameter in span_parameters}
    other_parameters = [parameter for parameter in model.parameters() if id(parameter) not in span_ids]
    lr = config.optimizer.lr
    groups = [{"params": other_parameters, "lr": lr}]
    if span_parameters:
        groups.append({"params": span_parameters, "lr": lr * config.lr_schedule.span_lr_factor})
    check_optimizer(config)
    optimizer = instantiate(config.optimizer, groups, **fused_option(config, model.position.device))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def fused_option(config: DictConfig, device: torch.device) -> dict[str, bool]:
    """`fused=True` on CUDA, one kernel a step, if the optimizer has it and the config does not choose otherwise."""
    arguments = inspect.signature(get_class(config.optimizer._target_)).parameters
    chosen = any(config.optimizer.get(name) is not None for name in ("fused", "foreach", "differentiable"))
    return {"fused": True} if device.type == "cuda" and "fused" in arguments and not chosen else {}


def check_optimizer(config: DictConfig) -> None:
    """Try the optimizer on a vector and a matrix: some need other gradients, a closure, or a device.

    Raises ValueError, with its reason, if it does not take a step with them.
    """
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (2, 2))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        instantiate(config.optimizer, parameters).step()
    except Exception as error:  # as many kinds as there are optimizers
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"optimizer._target_={config.optimizer._target_} cannot train this model: {reason}") from None


def autocast(config: DictConfig, device: torch.device) -> AbstractContextManager:
    """The context of every forward pass."""
    if config.run.precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
