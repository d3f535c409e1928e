"""What a trained model remembers."""

from collections.abc import Iterable

import torch
from torch import Tensor

from .memory.packed import dense
from .transformer import Layer, Transformer


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
            seen = layer.norm_attention(hidden) if layer.pre_norm else hidden
            span = layer.memory.span(dense(seen, torch.arange(block, device=hidden.device))).mean(1)  # (B T or 1,)
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
