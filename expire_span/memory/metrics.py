"""How much is remembered: the memory size that queries see, what is held, and its bytes."""

from typing import Any

import torch
from torch import Tensor

from .packed import Memory, carried_rows


def memory_size(span: Tensor, ramp: float, nearest: Tensor, farthest: Tensor, num_queries: int) -> Tensor:
    """Compute the average memory size: the memories with m > 0 per query (sections 3 and 4.1), averaged over the heads.

    The mask is above 0 at distances < span + ramp. Their count is a closed form, which needs no tensor of shape
    (queries, memories).

    Args:
        span: (N, H or 1), timesteps.
        ramp: R, timesteps.
        nearest: (N,), as returned by `visible_distances`.
        farthest: (N,), likewise.
        num_queries: B T.

    Returns:
        A scalar.
    """
    last = torch.minimum((span + ramp).ceil() - 1, farthest[:, None].to(span.dtype))  # (N, H or 1)
    return accurate_sum((last - nearest[:, None] + 1).clamp(min=0)).mean() / num_queries


def accurate_dtype(tensor: Tensor) -> torch.dtype:
    """The largest floating-point numbers that the tensor's device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def accurate_sum(values: Tensor) -> Tensor:
    """Sum (N, ...) over its rows, in float64 where the device has it: they may be billions."""
    return values.sum(0, dtype=accurate_dtype(values))


def aggregate_metrics(layer_metrics: list[dict[str, Tensor]], memories: list[Memory]) -> dict[str, Any]:
    """Combine the metrics of all layers.

    Args:
        layer_metrics: As returned by each layer.
        memories: What each layer keeps.

    Returns:
        span_loss: The sum of the layers' span losses, differentiable, with alpha.
        memory/size: Average memory size |C_t| (sections 3 and 4.1), the mean over queries, samples, heads and layers.
        memory/size_layer_N: The same for layer N.
        memory/held: Memories per sample that a layer holds after the block, the mean over samples and layers. More than
            a query sees where heads have different spans, or where random drop hides some.
        memory/held_layer_N: The same for layer N.
        memory/span: Average span of the block's hidden states, timesteps.
        memory/bytes: Size of the carried memories per sample, without cached keys, values and spans.
    """
    sizes = [metrics["memory_size"] for metrics in layer_metrics]
    batch_size = len(memories[0].offsets) - 1
    held = [len(memory.time) / batch_size for memory in memories]
    tensors = [tensor for memory in memories for tensor in (*carried_rows(memory), memory.offsets[1:])]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return {
        "span_loss": torch.stack([metrics["span_loss"] for metrics in layer_metrics]).sum(),
        "memory/size": torch.stack(sizes).mean(),
        "memory/span": torch.stack([metrics["span"] for metrics in layer_metrics]).mean(),
        "memory/held": sum(held) / len(held),
        "memory/bytes": num_bytes / batch_size,
        **{f"memory/size_layer_{index}": size for index, size in enumerate(sizes)},
        **{f"memory/held_layer_{index}": count for index, count in enumerate(held)},
    }
