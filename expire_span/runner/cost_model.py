"""Predict what a run costs on a device: bytes in memory by part, seconds per update. Nothing large is built."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from ..memory import Compressive, Mechanism
from ..transformer import Transformer, TransformerConfig
from .build import select_device
from .step_cost import StepCost

OVERHEAD = "gaps and libraries"  # a part of the memory of a CPU: what its allocator cannot reuse, and buffers of MKL
CPU_OVERHEAD = 0.3  # of all other parts, as measured in results/plan-memory.md
SAFETY_MARGIN = 0.1  # of a device's memory stays free: for the device's own use, and for what the model leaves out


@dataclass(frozen=True)
class Device:
    """Published figures of a device, and which share of its speed a training step is assumed to reach.

    Attributes:
        flops: Dense operations per second by precision; a multiplication and an addition are two.
        bandwidth: Bytes per second, of its memory.
        memory: Bytes.
        link: Bytes per second that it sends to another device of the machine.
        host_link: Bytes per second from the host's memory to the device's.
        efficiency: The assumed share of flops and bandwidth.
        type: cuda or cpu.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float
    host_link: float
    efficiency: float
    type: str = "cuda"


ASSUMED_EFFICIENCY = 0.4  # of a published peak; our assumption, to be replaced by what is measured
DEVICES = {
    "h100": Device(
        "H100 SXM, 80 GB",
        {"bfloat16": 989e12, "float32": 67e12, "float64": 34e12},
        *(3.35e12, 80e9, 450e9, 64e9, ASSUMED_EFFICIENCY),
    ),
    "a100": Device(
        "A100 SXM, 80 GB",
        {"bfloat16": 312e12, "float32": 19.5e12, "float64": 9.7e12},
        *(2.039e12, 80e9, 300e9, 32e9, ASSUMED_EFFICIENCY),
    ),
    "rtx4090": Device(
        "RTX 4090, 24 GB",
        {"bfloat16": 165.2e12, "float32": 82.6e12, "float64": 1.3e12},
        *(1.008e12, 24e9, 32e9, 32e9, ASSUMED_EFFICIENCY),
    ),
}


def matmul_flops(device: torch.device, precision: str) -> float:
    """Measure the operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    return 2 * size**3 / shortest_time(lambda: a @ b, device)


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a large copy reads and writes."""
    source, target = (torch.zeros(2**24, device=device) for _ in range(2))
    return 2 * source.nbytes / shortest_time(lambda: target.copy_(source), device)


def shortest_time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds, the best of several calls."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(seconds() for _ in range(10))


class RunSizes(NamedTuple):
    """What the predictions need to know of a run, whatever its micro-batch is."""

    config: DictConfig  # validated
    transformer: TransformerConfig
    mechanism: Mechanism  # of every layer
    num_parameters: int
    optimizer_numbers: float  # that the optimizer keeps for each parameter


def run_sizes(config: DictConfig, vocab_size: int, num_classes: int) -> RunSizes:
    """Find the sizes of a run: of a model without storage, and of an optimizer of a few weights."""
    sizes = {key: value for key, value in config.transformer.items() if key != "num_layers"}
    transformer = TransformerConfig(vocab_size=vocab_size, num_classes=num_classes, **sizes)
    with torch.device("meta"):
        model = Transformer(transformer, [instantiate(config.model) for _ in range(config.transformer.num_layers)])
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = instantiate(config.optimizer, [weight])
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.dim()]
    optimizer_numbers = sum(value.numel() for value in state) / weight.numel()
    return RunSizes(config, transformer, instantiate(config.model), num_parameters, optimizer_numbers)


def initial_memories(mechanism: Mechanism) -> int:
    """Memories that a layer holds of each stream with the spans that training begins with."""
    ratio = getattr(mechanism, "init_span_ratio", None)
    if ratio is None:
        return mechanism.max_memories
    return min(mechanism.max_memories, math.ceil(ratio * mechanism.max_span + mechanism.ramp))


def step_cost(sizes: RunSizes, micro_batch_size: int, num_memories: float, device_type: str) -> StepCost:
    """The cost of one block of a micro-batch with `num_memories` per stream and layer."""
    config, mechanism = sizes.config, sizes.mechanism
    block_size = config.train.block_size
    pooled = math.ceil(block_size / mechanism.compression_rate) if isinstance(mechanism, Compressive) else 0
    return StepCost(
        sizes.transformer,
        config.transformer.num_layers,
        micro_batch_size,
        block_size,
        num_memories,
        mechanism.num_positions,
        pooled,
        mechanism.num_heads or 1,
        config.run.precision,
        device_type,
    )


def memory_by_part(
    sizes: RunSizes, streams: int, micro_batch_size: int, num_memories: float, device_type: str
) -> dict[str, float]:
    """Predict the bytes in a device's memory at the peak of a training step, by part.

    Args:
        sizes: Of the run.
        streams: Those of this device.
        micro_batch_size: Streams that are processed at a time.
        num_memories: Per stream and layer.
        device_type: cuda or cpu.
    """
    cost = step_cost(sizes, micro_batch_size, num_memories, device_type)
    weights = sizes.num_parameters * cost.number
    held = cost.memory_bytes() * streams / micro_batch_size
    if sizes.config.train.offload_memory and device_type == "cuda":
        held = min(held, 2 * cost.memory_bytes())  # those of this part and of the next, which are copied ahead
    cast = sizes.num_parameters * cost.product if cost.product < cost.number else 0  # of weights, to bfloat16
    accumulates = micro_batch_size < streams or sizes.config.train.grad_accumulation > 1
    moments = [{"gradients": weights if accumulates else 0} | moment for moment in cost.moments()]
    moments.append({"gradients": weights, "memories in flight": cost.memory_bytes()})  # at the end of the backward pass
    peak = max(moments, key=lambda moment: sum(moment.values()))
    optimizer = weights * sizes.optimizer_numbers
    parts = {"weights": weights + cast, "gradients": 0, "optimizer state": optimizer, "memories held": held} | peak
    return parts | ({OVERHEAD: CPU_OVERHEAD * sum(parts.values())} if device_type == "cpu" else {})


def seconds_per_update(
    sizes: RunSizes, streams: int, micro_batch_size: int, num_memories: float, device: Device, processes: int = 1
) -> dict[str, float]:
    """Predict the seconds of one update, by part: without evaluation, data, and acting in environments.

    Args:
        sizes, streams, micro_batch_size, num_memories: As in `memory_by_part`.
        device: That of each process.
        processes: Over which gradients are reduced.

    Returns:
        training blocks; blocks without targets; what copying offloaded memories and reducing gradients add.
    """
    config = sizes.config
    cost = step_cost(sizes, micro_batch_size, num_memories, device.type)
    parts = streams // micro_batch_size
    speed = device.efficiency * device.flops[config.run.precision], device.efficiency * device.bandwidth
    train = config.train.grad_accumulation * parts * cost.seconds(*speed)
    fill = blocks_without_targets(config) * parts * cost.seconds(*speed, backward=False)
    seconds = {"training blocks": train, "blocks without targets": fill}
    if config.train.offload_memory:
        blocks = config.train.grad_accumulation + blocks_without_targets(config)
        copied = 2 * blocks * parts * cost.memory_bytes() / device.host_link  # to the device and back
        seconds["copying memories"] = max(0, copied - train - fill)  # what computing does not hide
    if processes > 1:
        sent = 2 * (processes - 1) / processes * sizes.num_parameters * cost.number  # a ring
        seconds["reducing gradients"] = sent / device.link
    return seconds


def blocks_without_targets(config: DictConfig) -> int:
    """Blocks that only fill the memory, for each that trains: those of copy's longest episodes; 0 in other tasks."""
    is_copy = config.task._target_ == "expire_span.tasks.copy.Copy"
    return config.task.episode_length // config.train.block_size - 1 if is_copy else 0


def largest_micro_batch(
    config: DictConfig, vocab_size: int, num_classes: int, streams: int, bytes_available: float
) -> int:
    """Find the largest divisor of the number of streams whose predicted training step fits, as a micro-batch size.

    Spans that are learned are taken to be the initial ones, or to keep a tenth of all memories if that is more.

    Args:
        config: As `config.schema.validate` returns it.
        vocab_size, num_classes: Of the task.
        streams: Those of this process.
        bytes_available: For everything: weights, optimizer and memories, too. A tenth of it stays free.

    Raises:
        ValueError: If not even one stream at a time fits.
    """
    sizes = run_sizes(config, vocab_size, num_classes)
    num_memories = expected_memories(sizes.mechanism)
    device_type = select_device(config.run.device).type
    fitting = fitting_micro_batch(sizes, streams, num_memories, device_type, bytes_available)
    if fitting is None:
        needed = sum(memory_by_part(sizes, streams, 1, num_memories, device_type).values())
        raise ValueError(
            f"train.micro_batch_size=auto: even one stream at a time is predicted to need {needed / 1e9:.1f} GB of the "
            f"{bytes_available / 1e9:.1f} GB that are free; add train.offload_memory=true or "
            "transformer.activation_checkpointing=true, or lower train.batch_size"
        )
    return fitting


def expected_memories(mechanism: Mechanism, kept: float = 0.1) -> float:
    """Memories per stream and layer: initial ones, or the share `kept` of all if that is more and spans are learned."""
    return max(initial_memories(mechanism), kept * mechanism.max_memories)


def fitting_micro_batch(
    sizes: RunSizes, streams: int, num_memories: float, device_type: str, bytes_available: float
) -> int | None:
    """The largest divisor of `streams` that is predicted to fit with a margin, None if even 1 does not."""
    for size in (size for size in range(streams, 0, -1) if streams % size == 0):
        if sum(memory_by_part(sizes, streams, size, num_memories, device_type).values()) <= usable(bytes_available):
            return size
    return None


def usable(bytes_available: float) -> float:
    """What a step may take of a memory."""
    return (1 - SAFETY_MARGIN) * bytes_available
