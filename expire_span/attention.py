"""One attention for every memory: a softmax over what is seen, weighted by how far it has faded (sections 3 and 4).

    distance = t - i        m = clamp(1 + (span - distance) / ramp, 0, 1)
    a' = m exp(score) / sum m exp(score)        which is        softmax(score + log m)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .kernels import operator

NEVER = 2**40  # an age that no span reaches: what padding has
PART = 2**19  # scores worked on at once


def fade(distance: Tensor, span: Tensor, ramp: float) -> Tensor:
    """m: 1 within the span, then falling to 0 over `ramp` timesteps (section 4)."""
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
    born: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The definition: plain, padded and slow. Every fast form equals it.

    query     (B, H, T, D)
    key       (B, H, S, D), value too
    age       (B or 1, S): distance of each key before the first query. Query t is at distance age + t from it; the
              block's own keys have ages 0, -1, ..., -(T - 1), so a query sees neither itself nor what comes after it
    span      broadcastable to (B, H, S), timesteps
    ramp      timesteps; 1 with a whole span is a hard edge
    position  (n, D): row j is the term of distance j + 1; keys farther than n get none
    reach     (B, T): only keys at distance <= reach are seen
    bias      broadcastable to (B, H, S): added to the score
    born      broadcastable to (B, S): a key is seen from this distance on (None: 1)
    dropout   share of the attention weights that is dropped

    Scores are (q . k + q . p) / sqrt(D) + bias. Returns (B, H, T, D); a query that sees nothing gets 0.
    """
    span = torch.atleast_2d(span)
    distance = age[:, None, None, :] + torch.arange(query.shape[2], device=age.device)[:, None]  # (B or 1, 1, T, S)
    m = fade(distance, span[..., None, :], ramp)  # (B or 1, H or 1, T, S)
    first = 1 if born is None else torch.atleast_2d(born)[:, None, None]  # (B or 1, 1, 1, S)
    seen = (m > 0) & (distance >= first)  # (B or 1, H or 1, T, S)
    if reach is not None:
        seen = seen & (distance <= reach[:, None, :, None])

    score = query @ key.transpose(-1, -2)  # (B, H, T, S)
    if position is not None and len(position) > 0:
        row = (distance - 1).clamp(0, len(position) - 1).expand_as(score)
        term = (query @ position.T).gather(-1, row)  # (B, H, T, S)
        score = score + term.masked_fill(distance > len(position), 0)
    score = score.to(torch.promote_types(score.dtype, m.dtype)) / query.shape[-1] ** 0.5  # bf16 scores in float32
    if bias is not None:
        score = score + torch.atleast_2d(bias)[..., None, :]

    score = score.masked_fill(~seen, -torch.inf)
    highest = score.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).min)  # finite where none is seen
    weight = m * torch.exp(score - highest)  # (B, H, T, S)
    total = weight.sum(-1, keepdim=True)  # (B, H, T, 1)
    weight = weight / total.masked_fill(total == 0, 1)
    weight = torch.nn.functional.dropout(weight, dropout)
    return weight.to(value.dtype) @ value


def samples_of(offsets: Tensor, total: int) -> Tensor:
    """(N,): the sample that each packed row belongs to, by offsets (B + 1,) or (parts, B + 1)."""
    lengths = offsets.diff()  # (parts, B)
    samples = torch.arange(lengths.shape[-1], device=offsets.device).expand_as(lengths)
    return torch.repeat_interleave(samples.flatten(), lengths.flatten(), output_size=total)


def together(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order (N,) in which each sample's rows of all parts stand together, and their offsets (B + 1,) in it."""
    lengths = offsets.diff().T.flatten()  # (B parts,): of each sample's rows of each part
    ends = lengths.cumsum(0)
    moved = offsets[:, :-1].T.flatten() - (ends - lengths)  # (B parts,)
    order = torch.arange(total, device=offsets.device)
    order = order + torch.repeat_interleave(moved, lengths, output_size=total)
    return order, torch.cat([ends.new_zeros(1), ends[len(offsets) - 1 :: len(offsets)]])


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
    born: Tensor | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """`span_attention` over packed keys: sample b owns rows offsets[b] to offsets[b + 1]. The one door to faster forms.

    query (B, H, T, D); key, value (N, H, D); offsets (B + 1,), or (parts, B + 1) where each sample has rows in several
    places; age, born (N,); span, bias broadcastable to (N, H); position, reach, ramp and dropout as above. rows (P,):
    the row of position that tells distance j + 1, each the last one's or the next (None: row j). Returns (B, H, T, D).

    kernel: "definition" pads and calls it. The others keep nothing as large as the scores for the backward pass: "cpp"
    is for the CPU, "triton" for CUDA; "torch" is the definition again, some samples at a time, and made anew backward.
    Each draws its own dropout. "auto" takes the first of these that can be had.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:  # else the operator itself looks what there is
        kernel = operator.form(kernel, query.device.type, query.dtype)
    if kernel in ("definition", "torch"):
        position = position if rows is None or position is None else position[rows]
        call = put_together(Packed(query, key, value, offsets, age, span, ramp, position, reach, bias, born, dropout))
        return padded(call) if kernel == "definition" else in_parts(call)
    seed = int(torch.randint(2**31 - 1, ())) if dropout else 0  # on the CPU: no device is waited for
    offsets, span = torch.atleast_2d(offsets), torch.atleast_2d(span)
    arguments = (query, key, value, offsets, age, span, float(ramp), position, rows, reach)
    bias = None if bias is None else torch.atleast_2d(bias)
    attention = torch.ops.expire_span.attention if compiling else operator.Eager.apply
    out, _ = attention(*arguments, bias, born, dropout, seed, kernel)
    return out


class Packed(NamedTuple):
    """What `packed_span_attention` is given."""

    query: Tensor
    key: Tensor
    value: Tensor
    offsets: Tensor
    age: Tensor
    span: Tensor
    ramp: float
    position: Tensor | None
    reach: Tensor | None
    bias: Tensor | None
    born: Tensor | None
    dropout: float

    def by_row(self, change: Callable[[Tensor], Any]) -> dict[str, Any]:
        """By name, what `change` makes of each tensor that has a row for every key."""
        rows = {name: getattr(self, name) for name in ("key", "value", "age", "span", "bias", "born")}
        wide = {name: each for name, each in rows.items() if each is not None and each.shape[:1] == self.age.shape}
        return {name: change(each) for name, each in wide.items()}


def put_together(call: Packed) -> Packed:
    """With each sample's rows together."""
    if call.offsets.dim() == 1:
        return call
    order, offsets = together(call.offsets, len(call.key))
    return call._replace(offsets=offsets, **call.by_row(lambda rows: rows.index_select(0, order)))


def in_parts(call: Packed) -> Tensor:
    """`packed_span_attention` by its definition, some samples at a time, of which nothing is kept but what came in."""
    samples, heads, block, _ = call.query.shape
    each = max(1, PART // max(1, heads * block * int(call.offsets.diff().max())))  # samples of a part
    firsts = range(0, samples, each)
    sizes = call.offsets[[*firsts, samples]].diff().tolist()  # rows of a part

    own: dict[str, Sequence[Any]] = call.by_row(lambda rows: rows.split(sizes))
    own["query"] = call.query.split(each)
    if call.reach is not None:
        own["reach"] = call.reach.split(each)
    own["offsets"] = [call.offsets[first : first + each + 1] - call.offsets[first] for first in firsts]
    parts = [call._replace(**dict(zip(own, values, strict=True))) for values in zip(*own.values(), strict=True)]
    return torch.cat([checkpoint(padded, part, use_reentrant=False) for part in parts])


def padded(call: Packed) -> Tensor:
    """`packed_span_attention` by its definition."""
    offsets = call.offsets
    samples, total = len(offsets) - 1, len(call.key)
    longest = int(offsets.diff().max())
    alike = samples * longest == total
    if not alike:
        sample = samples_of(offsets, total)  # (N,)
        slot = sample * longest + torch.arange(total, device=offsets.device) - offsets[sample]  # (N,)

    def pad(packed: Tensor, filler: float = 0.0) -> Tensor:  # (N, ...) -> (B, S, ...)
        if not alike:
            whole = packed.new_full((samples * longest, *packed.shape[1:]), filler)
            packed = whole.index_copy(0, slot, packed)
        return packed.unflatten(0, (samples, longest))

    def pad_by_head(packed: Tensor) -> Tensor:  # (N or 1, H or 1) -> (B or 1, H or 1, S or 1)
        packed = torch.atleast_2d(packed)
        return (pad(packed) if len(packed) == total else packed[None]).transpose(1, 2)

    return span_attention(
        call.query,
        pad(call.key).transpose(1, 2),
        pad(call.value).transpose(1, 2),
        age=pad(call.age, NEVER),
        span=pad_by_head(call.span),
        ramp=call.ramp,
        position=call.position,
        reach=call.reach,
        bias=None if call.bias is None else pad_by_head(call.bias),
        born=None if call.born is None else pad(call.born),
        dropout=call.dropout,
    )
