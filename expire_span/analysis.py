"""What a trained model remembers."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from .attention import fade
from .memory.packed import Memory, dense
from .transformer import Layer, State, Transformer


@torch.no_grad()
def remembered(model: Transformer, state: State) -> list[tuple[Tensor, Tensor]]:
    """What each layer holds for the next query: the timesteps (N,) of its memories, and m of each, mean over heads."""
    found = []
    for layer, memory in zip(model.layers, state["layers"], strict=True):
        layer = cast(Layer, layer)
        m = fade((state["now"] - memory.time)[:, None], span_of(layer, memory), layer.memory.ramp).mean(1)  # (N,)
        found.append((memory.time, m))
    return found


def span_of(layer: Layer, memory: Memory) -> Tensor:
    """The spans of what a layer holds: (N or 1, H or 1), timesteps."""
    return layer.memory.span(memory._replace(hidden=layer.norm_attention(memory.hidden)) if layer.pre_norm else memory)


@torch.no_grad()
def spans_over_time(
    model: Transformer, blocks: Iterable[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor]:  # figures 9 and 12
    """The span that each layer gives to each timestep when it is made.

    blocks: pairs of tokens (B, T) and reach (B, T) or None, in their order in time. Returns the spans, in timesteps,
    (layers, B, time), and the tokens (B, time).
    """
    spans: list[list[Tensor]] = [[] for _ in model.layers]

    def listen(number: int):
        def look(layer: Layer, arguments: tuple) -> None:
            hidden = arguments[0]  # (B, T, d), what enters the layer
            samples, block, _ = hidden.shape
            span = span_of(layer, dense(hidden, torch.arange(block, device=hidden.device))).mean(1)  # (B T or 1,)
            spans[number].append(span.expand(samples * block).view(samples, block))

        return look

    hooks = [layer.register_forward_pre_hook(listen(number)) for number, layer in enumerate(model.layers)]
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
