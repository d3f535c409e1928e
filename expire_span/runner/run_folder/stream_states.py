"""What a checkpoint holds of the parallel streams, and how it is divided anew among other ranks and micro-batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...memory import Memory
from ...memory.packed import map_rows
from ...transformer import State


def memories_of(states: Sequence[State], rows: Sequence[slice], first: int) -> list[dict[str, Any]]:
    """Memories as plain types.

    Args:
        states: of each micro-batch.
        rows: the streams of each, among those of this rank.
        first: the number of this rank's first stream among all.
    """
    return [
        {"first": first + part.start, "layers": [saved_memory(memory) for memory in state["layers"]]}
        for state, part in zip(states, rows, strict=True)
    ]


def saved_memory(memory: Memory) -> tuple[Tensor | None, ...]:
    """A memory without what can be computed again, and as short as it can be."""
    return tuple(memory[:4]) if memory.log_decay is None else (*memory[:4], None, None, memory.log_decay)


def select_memories(saved: Sequence[dict[str, Any]], wanted: slice) -> list[Memory]:
    """Each layer's memory of the wanted streams, from parts that hold them, and others, in order."""
    chosen: list[list[Memory]] = []
    for part in saved:
        first, num_streams = part["first"], len(part["layers"][0][3]) - 1
        start, stop = max(wanted.start, first) - first, min(wanted.stop, first + num_streams) - first
        if start < stop:
            chosen.append([of_streams(Memory(*memory), slice(start, stop)) for memory in part["layers"]])
    return [joined(memories) for memories in zip(*chosen, strict=True)]


def of_streams(memory: Memory, streams: slice) -> Memory:
    """The memories of some of the streams."""
    offsets = memory.offsets[streams.start : streams.stop + 1]
    rows = slice(int(offsets[0]), int(offsets[-1]))
    return map_rows(lambda tensor: tensor[rows], memory)._replace(offsets=offsets - offsets[0])


def joined(memories: Sequence[Memory]) -> Memory:
    """The memories of streams that follow one another."""
    if len(memories) == 1:
        return memories[0]
    lengths = torch.cat([memory.offsets.diff() for memory in memories])  # (B,)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return map_rows(lambda *rows: torch.cat(rows), *memories)._replace(offsets=offsets)


def select_rows(saved: Sequence[tuple[int, Any]], wanted: slice) -> Any:
    """The wanted streams of nested dictionaries of tensors (B, ...), each given with the number of its first stream."""
    first_part = saved[0][1]
    if isinstance(first_part, dict):
        return {name: select_rows([(first, part[name]) for first, part in saved], wanted) for name in first_part}
    chosen: list[Tensor] = []
    for first, tensor in saved:
        start, stop = max(wanted.start, first) - first, min(wanted.stop, first + len(tensor)) - first
        if start < stop:
            chosen.append(tensor[start:stop])
    return torch.cat(chosen) if len(chosen) > 1 else chosen[0]


def check_memories(layers: Sequence[Memory], num_layers: int, streams: slice, hidden_size: int) -> None:
    """Raises ValueError for memories that a model of these sizes could not be given."""
    is_valid: Any = len(layers) == num_layers
    for memory in layers:
        rows, offsets = len(memory.time), memory.offsets
        is_valid = is_valid and bool(
            memory.hidden.shape == (rows, hidden_size)
            and memory.hidden.is_floating_point()
            and memory.time.shape == memory.min_distance.shape == (rows,)
            and {memory.time.dtype, memory.min_distance.dtype, offsets.dtype} == {torch.int64}
            and offsets.shape == (streams.stop - streams.start + 1,)
            and offsets[0] == 0
            and offsets[-1] == rows
            and (offsets.diff() >= 0).all()
            and (
                memory.log_decay is None
                or (memory.log_decay.is_floating_point() and memory.log_decay.shape[:-1] == (rows,))
            )
        )
    if not is_valid:
        raise ValueError(f"its memories are not those of {num_layers} layers with hidden_size={hidden_size}")
