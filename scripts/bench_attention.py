"""PyTorch's own attentions in the place of ours: what they can express of it, and no more.

    sdpa    every memory within the longest span, hard edges, no positions; all samples with as many keys
    flex    everything: soft mask, positions, bias, reach; over keys padded to the longest sample, as the reference
    varlen  packed keys, hard edges, no positions; a memory is seen by all queries, also where it expires in between

They take the inputs of `packed_span_attention`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from expire_span.kernels.inputs import AttentionInputs
from expire_span.kernels.packed_layout import interleave_by_sample
from expire_span.kernels.padded import padded_attention


def sdpa(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **mask_inputs: Any) -> Tensor:
    """The obvious alternative: torch's own attention over the whole span, with a mask and without positions."""
    key, value = (packed.unflatten(0, (len(query), -1)).transpose(1, 2) for packed in (key, value))  # (B, H, S, D)
    age = mask_inputs["age"].unflatten(0, (len(query), -1))[0]  # (S,)
    distance = age + torch.arange(query.shape[2], device=age.device)[:, None]  # (T, S)
    visible = (distance >= 1) & (distance <= mask_inputs["span"].max())
    return scaled_dot_product_attention(query, key, value, attn_mask=visible)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None = None,
    rows: Tensor | None = None,
    reach: Tensor | None = None,
    bias: Tensor | None = None,
    min_distance: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`packed_span_attention` by flex_attention, without dropout: compiled on CUDA, plain PyTorch elsewhere."""
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got {dropout}")
    parts, bias = torch.atleast_2d(offsets), None if bias is None else torch.atleast_2d(bias)
    mask = (age, torch.atleast_2d(span), position, rows, reach, bias, min_distance)
    return padded_attention(AttentionInputs(query, key, value, parts, *mask, float(ramp)), flex_span_attention)


def flex_span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None = None,
    reach: Tensor | None = None,
    bias: Tensor | None = None,
    min_distance: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`span_attention` as a mask and a change of the scores: log m, the position's score and the bias are captured."""
    samples, heads, block, head_dim = query.shape
    shape = samples, heads, key.shape[2]  # (B, H, S)
    masked_heads = None if span.shape[-2] == 1 else heads  # None: one mask for all heads
    age, span = age.expand(samples, -1), span.expand(shape)
    mask_span = span.detach()  # flex_attention takes no gradient of a mask
    nearest = torch.ones_like(age) if min_distance is None else min_distance.expand(samples, -1)
    bias = None if bias is None else bias.expand(shape)
    table = None
    if position is not None and len(position):
        table = query @ position.T / head_dim**0.5  # (B, H, T, P)

    def visible(b: Tensor, h: Tensor, t: Tensor, i: Tensor) -> Tensor:
        distance = age[b, i] + t
        seen = (distance >= nearest[b, i]) & (1 + (mask_span[b, h, i] - distance) / ramp > 0)
        return seen if reach is None else seen & (distance <= reach[b, t])

    def score_with_mask(score: Tensor, b: Tensor, h: Tensor, t: Tensor, i: Tensor) -> Tensor:
        distance = age[b, i] + t
        m = (1 + (span[b, h, i] - distance) / ramp).clamp(1e-30, 1)  # above 0 wherever it is visible
        score = score + m.log()
        if bias is not None:
            score = score + bias[b, h, i]
        if table is not None:
            num_positions = table.shape[-1]
            score_of_position = table[b, h, t, (distance - 1).clamp(0, num_positions - 1)]
            score = score + torch.where(distance <= num_positions, score_of_position, 0.0)
        return score

    attend, make_mask = (each if query.device.type == "cpu" else compiled(each) for each in FLEX)
    block_mask = make_mask(visible, samples, masked_heads, block, shape[2], query.device)
    return attend(query, key, value, score_mod=score_with_mask, block_mask=block_mask)


FLEX = (flex_attention, create_block_mask)


@cache
def compiled(function: Any) -> Any:
    return torch.compile(function)


def varlen(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *, span: Tensor, **others: Any) -> Tensor:
    """torch.nn.attention.varlen over the packed keys, in bfloat16 and on CUDA: exact for Transformer-XL's spans."""
    from torch.nn.attention.varlen import varlen_attn

    samples, _, block, _ = query.shape
    order, bounds = interleave_by_sample(torch.atleast_2d(offsets), len(key))
    rows, bounds = without_last_rows(order, bounds)
    key, value = key[rows], value[rows]
    queries = query.transpose(1, 2).flatten(0, 1)  # (B T, H, D)
    query_bounds = torch.arange(samples + 1, device=query.device) * block
    longest = int(bounds.diff().max())
    window = (int(span.max()) - 1, 0)  # in rows, of which there are no more than timesteps
    out: Any = varlen_attn(queries, key, value, query_bounds.int(), bounds.int(), block, longest, window_size=window)
    return out.unflatten(0, (samples, block)).transpose(1, 2)  # (B, H, T, D)


def without_last_rows(order: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out the last row of each sample, which is the last query's own and which no query sees.

    varlen's causal mask ends at the lower right: without that row, query t sees the rows before its own.
    """
    samples = len(offsets) - 1
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[offsets[1:] - 1] = False
    rows = keep.nonzero_static(size=len(order) - samples).squeeze(1)
    return order[rows], offsets - torch.arange(samples + 1, device=offsets.device)


ATTENTIONS = {"sdpa": sdpa, "flex": flex, "varlen": varlen}
