"""What a trained model remembers."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from .attention import soft_mask
from .memory.packed import from_dense
from .transformer import State, Transformer, TransformerBlock


@torch.no_grad()
def memory_contents(model: Transformer, state: State) -> list[tuple[Tensor, Tensor]]:
    """Find what each layer remembers for the next query.

    Args:
        model: Any Transformer.
        state: As returned by the model.

    Returns:
        For each layer, the timesteps (N,) of its memories and the soft mask m (N,) of each, averaged over the heads.
    """
    contents = []
    for layer, memory in zip(model.layers, state["layers"], strict=True):
        layer = cast(TransformerBlock, layer)
        span = layer.spans(layer.normalized(memory))  # (N, H or 1)
        m = soft_mask((state["step"] - memory.time)[:, None], span, layer.mechanism.ramp).mean(1)  # (N,)
        contents.append((memory.time, m))
    return contents


@torch.no_grad()
def spans_over_time(model: Transformer, blocks: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Record the span that each layer gives to each timestep when it becomes a memory (figures 9 and 12).

    Args:
        model: In any mode; it is left in evaluation mode.
        blocks: Pairs of tokens (B, T) and reach (B, T) or None, in order of time.

    Returns:
        The spans (layers, B, time) in timesteps, averaged over the heads, and the tokens (B, time).
    """
    spans: list[list[Tensor]] = [[] for _ in model.layers]

    def record_spans(layer_index: int):
        def hook(layer: TransformerBlock, inputs: tuple) -> None:
            hidden = inputs[0]  # (B, T, d)
            batch_size, block_size, _ = hidden.shape
            memory = from_dense(hidden, torch.arange(block_size, device=hidden.device))
            span = layer.spans(layer.normalized(memory)).mean(1)  # (B T,)
            spans[layer_index].append(span.view(batch_size, block_size))

        return hook

    hooks = [layer.register_forward_pre_hook(record_spans(index)) for index, layer in enumerate(model.layers)]
    tokens, state = [], None
    try:
        for block, reach in blocks:
            state = model.initial_state(len(block)) if state is None else state
            _, state, _ = model.eval()(block, state, reach)
            tokens.append(block)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([torch.cat(parts, 1) for parts in spans]), torch.cat(tokens, 1)
