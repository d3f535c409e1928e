"""The memories of the parallel streams, in micro-batches that are processed one after another."""

import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..memory import Memory
from ..memory.packed import carried_rows, map_rows
from ..transformer import State, Transformer
from .cost_model import largest_micro_batch
from .logging.performance import free_memory
from .ranks import world_size

log = logging.getLogger(__name__)


class MicroBatches:
    """States of a model, one for each group of streams. `states[i]` is read, and replaced by the state after a block.

    Args:
        model: whose memories these are; they begin empty.
        num_streams: of this process.
        size: of a micro-batch (None: all streams); the last one may be smaller.
        offload: whether memories lie on the host while another micro-batch computes. They are copied in the background
            on CUDA, the next one ahead of its time; on a CPU they are on the host anyway.

    Attributes:
        rows: the streams of each micro-batch, among all of this process.
    """

    def __init__(self, model: Transformer, num_streams: int, size: int | None = None, offload: bool = False):
        size = min(size or num_streams, num_streams)
        self.rows = [slice(first, min(first + size, num_streams)) for first in range(0, num_streams, size)]
        device = model.position.device
        self.copies = copy_stream(device) if offload and device.type == "cuda" and len(self.rows) > 1 else None
        self.ahead: dict[int, State] = {}  # copied to the device before its turn
        self.states: list[State] = [{}] * len(self.rows)
        self.num_held = self.num_layer_streams = 0  # of all states that were set since `pop_held`
        self.finite: dict[int, Tensor] = {}  # of those that are offloaded: found out before they left the device
        for index, rows in enumerate(self.rows):
            self[index] = model.initial_state(rows.stop - rows.start)
        self.pop_held()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[State]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> State:
        if self.copies is None:
            return self.states[index]
        state = self.ahead.pop(index, None) or self.copied_to_device(index)
        compute = torch.cuda.current_stream(self.copies.device)
        compute.wait_stream(self.copies)
        for tensor in tensors_of(state):
            tensor.record_stream(compute)
        following = (index + 1) % len(self)
        if following not in self.ahead:
            self.ahead[following] = self.copied_to_device(following)
        return state

    def __setitem__(self, index: int, state: State) -> None:
        self.num_held += sum(len(memory.time) for memory in state["layers"])
        self.num_layer_streams += len(state["layers"]) * (self.rows[index].stop - self.rows[index].start)
        if self.copies is None:
            self.states[index] = state
            return
        copies = self.copies
        self.ahead.pop(index, None)
        copies.wait_stream(torch.cuda.current_stream(copies.device))

        def to_host(tensor: Tensor) -> Tensor:
            tensor.record_stream(copies)
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

        with torch.cuda.stream(copies):
            self.states[index] = state | {"layers": [moved(memory, to_host) for memory in state["layers"]]}
            self.finite[index] = are_finite(state)

    def copied_to_device(self, index: int) -> State:
        assert self.copies is not None
        state, device = self.states[index], self.copies.device

        def to_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        with torch.cuda.stream(self.copies):
            return state | {"layers": [moved(memory, to_device) for memory in state["layers"]]}

    def pop_held(self) -> float | None:
        """The memories that a layer held for a stream, the mean over blocks since the last call (None: no block)."""
        held = self.num_held / self.num_layer_streams if self.num_layer_streams else None
        self.num_held = self.num_layer_streams = 0
        return held

    def are_finite(self) -> list[Tensor]:
        """Whether the memories of each micro-batch are, as scalars."""
        if self.copies is None:
            return [are_finite(state) for state in self.states]
        torch.cuda.current_stream(self.copies.device).wait_stream(self.copies)
        return list(self.finite.values())

    def wait(self) -> list[State]:
        """All states where they lie, on the host if they are offloaded, with their copies complete."""
        if self.copies is not None:
            self.copies.synchronize()
        return self.states


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies: memory that is freed in one stream cannot be reused in another."""
    return torch.cuda.Stream(device)


def are_finite(state: State) -> Tensor:
    """Whether all numbers of a state's memories are finite, a scalar."""
    return torch.stack([memory.hidden.isfinite().all() for memory in state["layers"]]).all()


def moved(memory: Memory, move: Callable[[Tensor], Tensor]) -> Memory:
    """A memory that lies elsewhere. Cached keys and values, which can be computed again, are left behind."""
    there = map_rows(move, memory._replace(kv=None))
    return there._replace(offsets=move(memory.offsets), max_age=memory.max_age)


def tensors_of(state: State) -> Iterator[Tensor]:
    """The tensors of all memories of a state."""
    return (tensor for memory in state["layers"] for tensor in (*carried_rows(memory), memory.offsets))


def resolve_micro_batch_size(config: DictConfig, task: Any, device: torch.device, num_streams: int) -> None:
    """Replace train.micro_batch_size=auto by the largest size that is predicted to fit on the device.

    Raises ValueError if not even one stream at a time does.
    """
    if config.train.micro_batch_size != "auto":
        return
    free = free_bytes(device)
    size = largest_micro_batch(config, task.vocab_size, task.num_classes, num_streams, free)
    log.info(
        f"train.micro_batch_size=auto: {size} of {num_streams} streams at a time are predicted to fit into the "
        f"{free / 1e9:.1f} GB that are free"
    )
    config.train.micro_batch_size = size


def free_bytes(device: torch.device) -> int:
    """The memory that this process can use on the device, with what its tensors take already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def training_states(model: Transformer, config: DictConfig, num_streams: int) -> MicroBatches:
    """The empty memories of a training. Raises ValueError if `train.micro_batch_size` does not divide the streams."""
    size = config.train.micro_batch_size
    if size is not None and size < num_streams and num_streams % size:
        whose = "" if world_size() == 1 else f" of each of the {world_size()} processes"
        raise ValueError(f"train.micro_batch_size={size} must divide the {num_streams} streams{whose}")
    return MicroBatches(model, num_streams, size, config.train.offload_memory)


def evaluation_states(model: Transformer, config: DictConfig, num_streams: int) -> MicroBatches:
    """The empty memories of an evaluation, in micro-batches of the size that training has."""
    return MicroBatches(model, num_streams, config.train.micro_batch_size, config.train.offload_memory)
