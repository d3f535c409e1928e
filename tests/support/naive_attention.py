"""Attention as nested loops, straight from the equations: one query, one head, one memory at a time."""

import torch
from torch import Tensor


def naive_attention(
    query, key, value, *, age, span, ramp, position=None, reach=None, bias=None, min_distance=None, epsilon=0.0
) -> Tensor:
    """Compute what `expire_span.span_attention` does: age (B, S), span (B, H, S), bias (B, H, S), min_distance (B, S).

    epsilon: the authors' released code adds it to the sum of m a, where a is a softmax over the visible memories.
    """
    samples, heads, queries, head_dim = query.shape
    out = []
    for b in range(samples):
        for h in range(heads):
            for t in range(queries):
                weights, exponentials, values = [], [], []
                for i in range(key.shape[2]):
                    distance = int(age[b, i]) + t
                    m = torch.clamp(1 + (span[b, h, i] - distance) / ramp, 0, 1)
                    too_near = distance < (1 if min_distance is None else int(min_distance[b, i]))
                    too_far = reach is not None and distance > int(reach[b, t])
                    if too_near or too_far or m <= 0:
                        continue
                    score = query[b, h, t] @ key[b, h, i]
                    if position is not None and distance <= len(position):
                        score = score + query[b, h, t] @ position[distance - 1]
                    score = score / head_dim**0.5 + (0 if bias is None else bias[b, h, i])
                    exponentials.append(torch.exp(score))
                    weights.append(m * exponentials[-1])
                    values.append(value[b, h, i])
                if weights:
                    weight = torch.stack(weights)
                    total = weight.sum() + epsilon * torch.stack(exponentials).sum()
                    out.append((weight / total) @ torch.stack(values))
                else:
                    out.append(torch.zeros(head_dim, dtype=query.dtype))
    return torch.stack(out).view(samples, heads, queries, head_dim)


def naive_packed_attention(epsilon: float = 0.0):
    """Return a stand-in for `packed_span_attention` that computes each sample by nested loops."""

    def attend(
        query,
        key,
        value,
        offsets,
        *,
        age,
        span,
        ramp,
        position,
        reach,
        min_distance,
        bias=None,
        rows=None,
        dropout=0.0,
        backend="auto",
    ):
        assert rows is None
        assert dropout == 0
        heads, out = key.shape[1], []
        for b, ranges in enumerate(torch.atleast_2d(offsets).unfold(1, 2, 1).unbind(1)):  # (parts, 2)
            rows = torch.cat([torch.arange(start, end) for start, end in ranges.tolist()])
            keys, values = (packed[None, rows].transpose(1, 2) for packed in (key, value))
            sample = naive_attention(
                query[b : b + 1],
                keys,
                values,
                age=age[None, rows],
                span=span.expand(len(key), heads)[None, rows].transpose(1, 2),  # (1, H, S)
                ramp=ramp,
                position=position,
                reach=None if reach is None else reach[b : b + 1],
                bias=None if bias is None else bias.expand(len(key), heads)[None, rows].transpose(1, 2),
                min_distance=min_distance[None, rows],
                epsilon=epsilon,
            )
            out.append(sample)
        return torch.cat(out)

    return attend
