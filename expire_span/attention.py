"""Attention over memories that expire (section 4.1).

A soft mask m weights the softmax of query t over memories i:

    distance = t - i        m = clamp(1 + (span - distance) / ramp, 0, 1)
    a' = m exp(score) / sum m exp(score)        which is        softmax(score + log m)
"""

import torch
from torch import Tensor

from .kernels import dispatch
from .kernels.inputs import AttentionInputs
from .kernels.padded import chunked_attention, padded_attention


def soft_mask(distance: Tensor, span: Tensor, ramp: float) -> Tensor:
    """Return the soft mask m: 1 within the span, then falling linearly to 0 over the ramp (section 4.1).

    Args:
        distance: Timesteps, of a shape that broadcasts with the one of span.
        span: Timesteps.
        ramp: R, timesteps.
    """
    return (1 + (span - distance) / ramp).clamp(0, 1)


def span_attention(
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
    """Reference attention over padded keys: plain and slow. Every backend computes the same.

    The scores are (q . k + q . p) / sqrt(D) + bias, with the relative position p of section 4.2.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        age: (B or 1, S), timesteps from each key to the first query. Query t is at distance age + t from the key. The
            block's own keys have ages 0, -1, ..., -(T - 1), so that a query sees only what came before it.
        span: Broadcastable to (B, H, S), timesteps.
        ramp: R, timesteps. A ramp of 1 with integer spans is a hard edge.
        position: (n, D), where row j is for distance j + 1. Keys farther than n get no position term.
        reach: (B, T), timesteps. Query t sees only keys at distances up to reach[:, t], such as those of its episode,
            or those that the random drop of section 4.2 leaves.
        bias: Broadcastable to (B, H, S), added to the scores.
        min_distance: Broadcastable to (B, S), timesteps. A key is visible from this distance on (None: 1).
        dropout: Share of the attention weights to drop.

    Returns:
        (B, H, T, D); 0 for a query that sees no key.
    """
    if key.shape[2] == 0:
        return query @ key.transpose(-1, -2) @ value  # zeros
    span = torch.atleast_2d(span)
    distance = age[:, None, None, :] + torch.arange(query.shape[2], device=age.device)[:, None]  # (B or 1, 1, T, S)
    m = soft_mask(distance, span[..., None, :], ramp)  # (B or 1, H or 1, T, S)
    nearest = 1 if min_distance is None else torch.atleast_2d(min_distance)[:, None, None]  # (B or 1, 1, 1, S)
    visible = (m > 0) & (distance >= nearest)  # (B or 1, H or 1, T, S)
    if reach is not None:
        visible = visible & (distance <= reach[:, None, :, None])

    score = query @ key.transpose(-1, -2)  # (B, H, T, S)
    if position is not None and len(position) > 0:
        row = (distance - 1).clamp(0, len(position) - 1).expand_as(score)
        position_score = (query @ position.T).gather(-1, row)  # (B, H, T, S)
        score = score + position_score.masked_fill(distance > len(position), 0)
    score = score.to(torch.promote_types(score.dtype, m.dtype)) / query.shape[-1] ** 0.5  # bf16 scores in float32
    if bias is not None:
        score = score + torch.atleast_2d(bias)[..., None, :]

    score = score.masked_fill(~visible, -torch.inf)
    score_max = score.detach().amax(-1, keepdim=True)  # (B, H, T, 1), -inf where no key is visible
    score_max = score_max.clamp(min=torch.finfo(score.dtype).min)
    weight = m * torch.exp(score - score_max)  # (B, H, T, S); log m would have an infinite gradient at m = 0
    total = weight.sum(-1, keepdim=True)  # (B, H, T, 1)
    weight = weight / total.masked_fill(total == 0, 1)
    weight = torch.nn.functional.dropout(weight, dropout)
    return weight.to(value.dtype) @ value


def packed_span_attention(
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
    backend: str = "auto",
) -> Tensor:
    """Compute `span_attention` over packed keys, with the fastest backend available unless one is named.

    Args:
        query: (B, H, T, D).
        key: (N, H, D), the keys of all samples, back to back.
        value: (N, H, D).
        offsets: (B + 1,): sample b owns the rows offsets[b] to offsets[b + 1]. Or (parts, B + 1), where each sample has
            rows in several places, such as in its memory and in its block.
        age: (N,), as in `span_attention`.
        span: Broadcastable to (N, H), timesteps.
        ramp: R, timesteps.
        position: (n, D), as in `span_attention`.
        rows: (P,), the row of `position` for distance j + 1, where distances share rows: rows[j] is rows[j - 1] or the
            next one (None: row j).
        reach: (B, T), timesteps.
        bias: Broadcastable to (N, H).
        min_distance: (N,), timesteps.
        dropout: Share of the attention weights to drop. Each backend draws a mask of its own.
        backend: "cpp" (fused, CPU), "triton" (fused, CUDA), "torch" (the reference, for some samples at a time and
            recomputed in backward), "reference" (the reference over padded keys), or "auto": the first of cpp, triton
            and torch that is available. Only "reference" keeps the scores for the backward pass.

    Returns:
        (B, H, T, D); 0 for a query that sees no key.

    Raises:
        ValueError: If the backend is unknown or not available for the device and dtype of `query`.
    """
    if not torch.compiler.is_compiling():  # the compiled operator selects a backend when it runs
        backend = dispatch.select_backend(backend, query.device.type, query.dtype)
    offsets = offsets[None] if offsets.dim() == 1 else offsets  # (parts, B + 1)
    span = torch.atleast_2d(span)
    bias = None if bias is None else torch.atleast_2d(bias)
    inputs = AttentionInputs(
        query, key, value, offsets, age, span, position, rows, reach, bias, min_distance, float(ramp), dropout
    )
    if backend == "reference":
        return padded_attention(inputs, span_attention)
    if backend == "torch":
        return chunked_attention(inputs, span_attention)
    if dropout:
        inputs = inputs._replace(seed=int(torch.randint(2**31 - 1, ())))  # drawn on the CPU, not to wait for a device
    return dispatch.fused_attention(inputs, backend)
