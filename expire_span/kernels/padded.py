"""Packed attention by padding: every sample gets the same number of keys, for an attention that is not packed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .inputs import AttentionInputs
from .packed_layout import NEVER, interleave_by_sample, sample_index

CHUNK_SCORES = 2**19  # scores in memory at a time in `chunked_attention`, unless one sample has more

Attention = Callable[..., Tensor]  # with the signature of `span_attention`


def padded_attention(inputs: AttentionInputs, attention: Attention) -> Tensor:
    """Compute packed attention, (B, H, T, D), by one call of `attention` over padded keys."""
    return _pad_and_attend(_simplify(inputs), attention)


def chunked_attention(inputs: AttentionInputs, attention: Attention) -> Tensor:
    """Compute the same for a few samples at a time, keep only the inputs, and recompute the rest in backward."""
    inputs = _simplify(inputs)
    samples, heads, block, _ = inputs.query.shape
    offsets = inputs.offsets[0]  # (B + 1,)
    size = max(1, CHUNK_SCORES // max(1, heads * block * int(offsets.diff().max())))  # samples of a chunk
    firsts = range(0, samples, size)
    num_rows = offsets[[*firsts, samples]].diff().tolist()  # of each chunk

    fields: dict[str, Sequence[Any]] = {name: rows.split(num_rows) for name, rows in _per_row(inputs).items()}
    fields["query"] = inputs.query.split(size)
    if inputs.reach is not None:
        fields["reach"] = inputs.reach.split(size)
    fields["offsets"] = [offsets[None, first : first + size + 1] - offsets[first] for first in firsts]
    chunks = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    return torch.cat(
        [checkpoint(_pad_and_attend, inputs._replace(**chunk), attention, use_reentrant=False) for chunk in chunks]
    )


def _per_row(inputs: AttentionInputs) -> dict[str, Any]:
    """The tensors that have one row for each of the N keys."""
    names = ("key", "value", "age", "span", "bias", "min_distance")
    tensors = {name: getattr(inputs, name) for name in names}
    return {name: rows for name, rows in tensors.items() if rows is not None and len(rows) == len(inputs.age)}


def _simplify(inputs: AttentionInputs) -> AttentionInputs:
    """Rewrite the inputs with a single part, and with a row of the position table for every distance."""
    if inputs.rows is not None and inputs.position is not None:
        inputs = inputs._replace(position=inputs.position[inputs.rows])
    if len(inputs.offsets) == 1:
        return inputs
    order, offsets = interleave_by_sample(inputs.offsets, len(inputs.key))
    grouped = {name: rows.index_select(0, order) for name, rows in _per_row(inputs).items()}
    return inputs._replace(offsets=offsets[None], **grouped)


def _pad_and_attend(inputs: AttentionInputs, attention: Attention) -> Tensor:
    """Compute packed attention of simplified inputs."""
    [offsets] = inputs.offsets
    samples, total = len(offsets) - 1, len(inputs.key)
    longest = int(offsets.diff().max())
    needs_padding = samples * longest != total
    if needs_padding:
        sample = sample_index(offsets, total)  # (N,)
        slot = sample * longest + torch.arange(total, device=offsets.device) - offsets[sample]  # (N,)

    min_distance = inputs.min_distance
    if needs_padding and min_distance is None:
        min_distance = torch.ones_like(inputs.age)

    def pad(packed: Tensor, filler: float = 0.0) -> Tensor:  # (N, ...) -> (B, S, ...)
        if needs_padding:
            padded = packed.new_full((samples * longest, *packed.shape[1:]), filler)
            packed = padded.index_copy(0, slot, packed)
        return packed.unflatten(0, (samples, longest))

    def pad_by_head(packed: Tensor) -> Tensor:  # (N or 1, H or 1) -> (B or 1, H or 1, S or 1)
        return (pad(packed) if len(packed) == total else packed[None]).transpose(1, 2)

    return attention(
        inputs.query,
        pad(inputs.key).transpose(1, 2),
        pad(inputs.value).transpose(1, 2),
        age=pad(inputs.age),
        span=pad_by_head(inputs.span),
        ramp=inputs.ramp,
        position=inputs.position,
        reach=inputs.reach,
        bias=None if inputs.bias is None else pad_by_head(inputs.bias),
        min_distance=None if min_distance is None else pad(min_distance, NEVER),  # hides the padding from any span
        dropout=inputs.dropout,
    )
