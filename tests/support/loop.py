"""Attention as nested loops, straight from the equations: one query, one head, one memory at a time."""

import torch
from torch import Tensor


def attention_by_loops(query, key, value, *, age, span, ramp, position=None, reach=None, bias=None, born=None) -> Tensor:
    """Arguments and result of `expire_span.span_attention`; span (B, H, S), bias (B, H, S), born (B, S), age (B, S)."""
    samples, heads, queries, size = query.shape
    out = []
    for b in range(samples):
        for h in range(heads):
            for t in range(queries):
                weights, values = [], []
                for i in range(key.shape[2]):
                    distance = int(age[b, i]) + t
                    m = torch.clamp(1 + (span[b, h, i] - distance) / ramp, 0, 1)
                    far = reach is not None and distance > int(reach[b, t])
                    if distance < (1 if born is None else int(born[b, i])) or far or m <= 0:
                        continue
                    score = query[b, h, t] @ key[b, h, i]
                    if position is not None and distance <= len(position):
                        score = score + query[b, h, t] @ position[distance - 1]
                    score = score / size**0.5 + (0 if bias is None else bias[b, h, i])
                    weights.append(m * torch.exp(score))
                    values.append(value[b, h, i])
                if weights:
                    weight = torch.stack(weights)
                    out.append((weight / weight.sum()) @ torch.stack(values))
                else:
                    out.append(torch.zeros(size, dtype=query.dtype))
    return torch.stack(out).view(samples, heads, queries, size)
