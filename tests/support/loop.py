"""Attention as nested loops, straight from the equations: one query, one head, one memory at a time."""

import torch
from torch import Tensor


def attention_by_loops(
    query, key, value, *, age, span, ramp, position=None, reach=None, bias=None, born=None, epsilon=0.0
) -> Tensor:
    """Arguments and result of `expire_span.span_attention`; span (B, H, S), bias (B, H, S), born (B, S), age (B, S).

    epsilon: what the authors' released code adds to the sum of m a, over a softmax of what is seen.
    """
    samples, heads, queries, size = query.shape
    out = []
    for b in range(samples):
        for h in range(heads):
            for t in range(queries):
                weights, exponentials, values = [], [], []
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
                    exponentials.append(torch.exp(score))
                    weights.append(m * exponentials[-1])
                    values.append(value[b, h, i])
                if weights:
                    weight = torch.stack(weights)
                    total = weight.sum() + epsilon * torch.stack(exponentials).sum()
                    out.append((weight / total) @ torch.stack(values))
                else:
                    out.append(torch.zeros(size, dtype=query.dtype))
    return torch.stack(out).view(samples, heads, queries, size)


def packed_by_loops(epsilon: float = 0.0):
    """What stands in for `packed_span_attention`: each sample by nested loops."""

    def attend(query, key, value, offsets, *, age, span, ramp, position, born, dropout=0.0, kernel="auto", **others):
        assert all(other is None for other in others.values())  # rows, reach
        assert dropout == 0
        heads, out = key.shape[1], []
        for b, ends in enumerate(torch.atleast_2d(offsets).unfold(1, 2, 1).unbind(1)):  # (parts, 2)
            rows = torch.cat([torch.arange(start, end) for start, end in ends.tolist()])
            own = {"age": age[None, rows], "born": born[None, rows], "ramp": ramp, "position": position}
            spans = span.expand(len(key), heads)[None, rows].transpose(1, 2)  # (1, H, S)
            keys, values = (packed[None, rows].transpose(1, 2) for packed in (key, value))
            out.append(attention_by_loops(query[b : b + 1], keys, values, span=spans, epsilon=epsilon, **own))
        return torch.cat(out)

    return attend
