"""Packed attention in plain torch: for the CPU, for float64, and wherever there is no Triton.

Forward, tile after tile, keeping nothing but its inputs:

    a' = softmax(q . k + q . p + bias + log m)          out = a' v

Backward makes a tile's a' again, and from it

    dP = dout v^T     dS = a' (dP - sum a' dP)     dq = dS k + dR p     dk = dS^T q     dv = a'^T dout
    d bias = sum_t dS                  d span = sum_t dS / (m R), over the queries for which m is on the ramp

A tile is one sample with all its keys, and some of its heads; or, where keys are few, some samples, padded. Only keys
that some query does not see in full, the `faded` ones, have an m; and only those that are `near` have position terms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

NEVER = 2**40  # an age that no span reaches: what padding has
TILE = 2**19  # scores worked on at once, which then stay in a cache; more where one head has more
SAMPLE = 2**15  # scores of a sample from which it is a tile of its own


class Given(NamedTuple):
    """What a call has been given, with everything that is computed with in one dtype, and what it is about."""

    query: Tensor  # (B, H, T, D), divided by sqrt(D)
    key: Tensor  # (N, H, D)
    value: Tensor  # (N, H, D)
    bias: Tensor | None  # (N, H or 1)
    ends: list[int]  # offsets
    table: Tensor | None  # (P + 2 T, D): the position terms, the farthest first, between T rows of zeros on each side
    column: Tensor  # (N,): a key's column in a `Window`
    near: "Rows"  # those within the reach of the table
    faded: "Rows"  # those that some query does not see in full
    m: Tensor  # (n, H or 1, T), of the faded ones, for each query; 0 also for what it does not see
    left: Tensor  # (n, H or 1, T): m before it was clamped
    log_m: Tensor  # (n, H or 1, T)
    blind: list[bool]  # by sample: whether a query may see nothing


class Rows(NamedTuple):
    """Some of the packed rows, in order, and by sample."""

    rows: Tensor  # (n,)
    ends: list[int]  # sample b has numbers ends[b] to ends[b + 1] of them


def rows_where(mask: Tensor, offsets: Tensor) -> Rows:
    rows = mask.nonzero().squeeze(-1)
    return Rows(rows, torch.searchsorted(rows, offsets).tolist())


def given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None,
    reach: Tensor | None,
    bias: Tensor | None,
    born: Tensor | None,
) -> Given:
    dtype = torch.promote_types(query.dtype, torch.promote_types(span.dtype, torch.float32))
    block, size, total = query.shape[2], query.shape[3], len(key)
    table, farthest = None, 0
    if position is not None and len(position) and total:
        farthest = min(len(position), max(1, int(age.max()) + block))  # P, but for what is farther than any key
        table = pad(position[:farthest].to(dtype).flip(0), (0, 0, block, block))  # (P + 2 T, D)
    column = (farthest + 1 - age).clamp(0, farthest + block)  # (N,); column 0 is farther than any term

    span, age = span.to(dtype).expand(total, -1), age.to(dtype)  # (N, H or 1), (N,)
    first = torch.ones_like(age) if born is None else born.to(dtype)  # (N,)
    whole = (span > age[:, None] + (block - 1)).all(1) & (age >= first)  # (N,): seen in full by every query
    time = torch.arange(block, device=age.device, dtype=dtype)
    ends = offsets.tolist()
    if reach is not None:
        sample = torch.repeat_interleave(offsets.diff(), output_size=total)  # (N,)
        whole &= age <= (reach - time).amin(1).index_select(0, sample)
    faded = rows_where(~whole, offsets)

    age, first, span = (each.index_select(0, faded.rows) for each in (age, first, span))
    distance = age[:, None, None] + time  # (n, 1, T)
    left = (span[..., None] - distance).div_(ramp).add_(1)  # (n, H or 1, T)
    seen = distance >= first[:, None, None]  # (n, 1, T)
    if reach is not None:
        seen &= distance <= reach.index_select(0, sample.index_select(0, faded.rows))[:, None]
    m = left.clamp(0, 1).mul_(seen)
    log_m = m.clamp(min=torch.finfo(dtype).tiny).log_().masked_fill_(m == 0, -torch.inf)  # log(0) itself is slow
    return Given(
        (query / size**0.5).to(dtype).contiguous(),
        key.to(dtype),
        value.to(dtype),
        None if bias is None else bias.to(dtype).expand(total, -1),
        ends,
        table,
        column,
        rows_where(column > 0, offsets),
        faded,
        m,
        left,
        log_m,
        [faded.ends[b + 1] - faded.ends[b] == ends[b + 1] - ends[b] for b in range(len(ends) - 1)],
    )


class Tile(NamedTuple):
    """Samples first to last, their packed rows, and some of the heads."""

    first: int
    last: int
    rows: slice
    longest: int  # keys of a sample, at most
    slots: Tensor | None  # (rows,): where each row stands in (samples, longest); None where nothing is padded
    heads: slice


def tiles(ends: list[int], heads: int, block: int, device: torch.device) -> Iterator[Tile]:
    first = 0
    while first < len(ends) - 1:
        last, longest = first + 1, ends[first + 1] - ends[first]
        while last < len(ends) - 1 and heads * block * longest < SAMPLE:
            longer = max(longest, ends[last + 1] - ends[last])
            if heads * block * longer * (last + 1 - first) > TILE // 2:
                break
            last, longest = last + 1, longer
        rows, slots = slice(ends[first], ends[last]), None
        if rows.stop - rows.start != (last - first) * longest:
            slots = torch.cat([
                torch.arange(ends[b + 1] - ends[b], device=device) + (b - first) * longest for b in range(first, last)
            ])  # fmt: skip
        each = max(1, min(heads, TILE // max(1, block * longest)))
        for head in range(0, heads if longest else 0, each):
            yield Tile(first, last, rows, longest, slots, slice(head, min(head + each, heads)))
        first = last


def padded(packed: Tensor, tile: Tile, filler: float = 0.0) -> Tensor:
    """A tile's rows (n, ...) as (G, S, ...)."""
    rows, samples = packed[tile.rows], tile.last - tile.first
    if tile.slots is not None:
        whole = packed.new_full((samples * tile.longest, *packed.shape[1:]), filler)
        rows = whole.index_copy_(0, tile.slots, rows)
    return rows.unflatten(0, (samples, tile.longest))


def unpadded(tile: Tile, parts: Tensor) -> Tensor:
    """The reverse: (G, S, ...) as a tile's rows (n, ...)."""
    rows = parts.flatten(0, 1)
    return rows if tile.slots is None else rows.index_select(0, tile.slots)


def of_heads(rows: Tensor, tile: Tile) -> Tensor:
    """(n, H or 1, ...) -> the tile's heads, or the one for all."""
    return rows[:, tile.heads] if rows.shape[1] > 1 else rows


def by_head(packed: Tensor, tile: Tile) -> Tensor:
    """(n, H, D) -> (G, H, S, D), as a product of many small matrices wants it."""
    rows = padded(packed, tile).transpose(1, 2)[:, tile.heads]
    return rows if tile.last == tile.first + 1 else rows.contiguous()


def within(some: Rows, tile: Tile) -> tuple[Tensor, slice]:
    """The tile's share of some rows: where they stand among its keys (G S), and which of them they are."""
    share = slice(some.ends[tile.first], some.ends[tile.last])
    rows = some.rows[share] - tile.rows.start
    return rows if tile.slots is None else tile.slots.index_select(0, rows), share


class Window:
    """The position terms of a tile's scores, out of those of all distances, without an index for each score.

    terms (G, H, T, P + 2 T) holds q . p by distance, the farthest first. One step to the next query shifts a key by
    one distance; so in a view whose rows begin one later each time, a key is a column: that of its age.
    """

    def __init__(self, call: Given, tile: Tile):
        assert call.table is not None
        self.table = call.table
        self.grouped = tile.last > tile.first + 1
        if self.grouped:
            self.column = padded(call.column, tile)[:, None, None]  # (G, 1, 1, S)
        else:
            self.key, share = within(call.near, tile)  # (n,)
            rows = call.near.rows[share]
            self.column = call.column.index_select(0, rows)  # (n,)
            # No index at all where every key is one distance nearer than the one before it.
            together = bool((self.key.diff() == 1).all() & (self.column.diff() == 1).all()) and len(rows) > 0
            self.run = (int(self.key[0]), int(self.column[0]), len(rows)) if together else None

    def view(self, terms: Tensor) -> Tensor:  # (G, H, T, P + 2 T) -> (G, H, T, P + T + 1)
        samples, heads, block, width = terms.shape
        strides = (heads * block * width, block * width, width - 1, 1)
        return terms.as_strided((samples, heads, block, width - block + 1), strides, terms.storage_offset() + block - 1)

    def add_to(self, score: Tensor, query: Tensor) -> None:
        """Adds each key's term to the scores (G, H, T, S)."""
        view = self.view(torch.matmul(query, self.table.T).contiguous())
        if self.grouped:
            score += view.gather(-1, self.column.expand_as(score))
        elif self.run is not None:
            key, column, length = self.run
            score[..., key : key + length] += view[..., column : column + length]
        else:
            score.index_add_(-1, self.key, view.index_select(-1, self.column))

    def gradient(self, score: Tensor) -> Tensor:
        """The gradient of `terms` (G, H, T, P + 2 T), given that of the scores."""
        terms = score.new_zeros(*score.shape[:3], len(self.table))
        if self.grouped:
            self.view(terms).scatter_add_(-1, self.column.expand_as(score), score)
        elif self.run is not None:
            key, column, length = self.run
            self.view(terms)[..., column : column + length] = score[..., key : key + length]
        else:
            self.view(terms).index_add_(-1, self.column, score.index_select(-1, self.key))
        return terms


def weights(call: Given, tile: Tile, query: Tensor, key: Tensor, window: Window | None) -> Tensor:
    """a' (G, H, T, S); a query that sees nothing has zeros."""
    score = query @ key.transpose(-1, -2)  # (G, H, T, S)
    if window is not None:
        window.add_to(score, query)
    if call.bias is not None:
        score += of_heads(padded(call.bias, tile).transpose(1, 2), tile)[:, :, None]
    keys, share = within(call.faded, tile)  # (n,)
    log_m = of_heads(call.log_m[share], tile)  # (n, H or 1, T)
    if tile.last == tile.first + 1:
        score.index_add_(-1, keys, log_m.permute(1, 2, 0)[None].expand(*score.shape[:3], -1))
    else:
        mask = padded(torch.zeros_like(call.column, dtype=score.dtype), tile, -torch.inf).flatten()  # (G S,)
        mask = mask[:, None, None].repeat(1, *log_m.shape[1:]).index_copy_(0, keys, log_m)  # (G S, H or 1, T)
        score += mask.unflatten(0, (-1, tile.longest)).permute(0, 2, 3, 1)
    blind = (score == -torch.inf).all(-1, keepdim=True) if any(call.blind[tile.first : tile.last]) else None
    weight = torch.softmax(score, -1, out=score)
    return weight if blind is None else weight.masked_fill_(blind, 0)


def dropped(weight: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor | None:
    """The factors of dropout (G, H, T, S): 0, or 1 / (1 - p)."""
    if generator is None:
        return None
    return torch.empty_like(weight).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def chance(dropout: float, seed: int, device: torch.device) -> torch.Generator | None:
    return torch.Generator(device).manual_seed(seed) if dropout else None


@torch.no_grad()
def forward(
    query, key, value, offsets, age, span, ramp, position, reach, bias, born, dropout, seed
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) in query's dtype; the second, log-sum-exps in other forms, is not needed here."""
    call = given(query, key, value, offsets, age, span, ramp, position, reach, bias, born)
    samples, heads, block, size = query.shape
    out = query.new_zeros(samples, block, heads, size).transpose(1, 2)  # (B, H, T, D)
    generator = chance(dropout, seed, query.device)
    for tile in tiles(call.ends, heads, block, query.device):
        here = slice(tile.first, tile.last), tile.heads
        part, keys, values = call.query[here], by_head(call.key, tile), by_head(call.value, tile)  # (G, H, T or S, D)
        weight = weights(call, tile, part, keys, None if call.table is None else Window(call, tile))
        factor = dropped(weight, dropout, generator)
        out[here] = (weight if factor is None else weight * factor) @ values
    return out, out.new_empty(samples, heads, block, dtype=torch.float32)


@torch.no_grad()
def backward(
    gradient, out, lse, query, key, value, offsets, age, span, ramp, position, reach, bias, born, dropout, seed, needs
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key, value, span, position and bias that `needs`, six bools, asks for."""
    call = given(query, key, value, offsets, age, span, ramp, position, reach, bias, born)
    heads, block, size = query.shape[1:]
    grad_query, grad_key, grad_value = (torch.zeros_like(each) for each in (call.query, call.key, call.value))
    grad_span = call.key.new_zeros(len(key), heads if span.shape[1] > 1 else 1)
    grad_bias = call.key.new_zeros(len(key), heads)
    grad_table = None if call.table is None else torch.zeros_like(call.table)
    gradient = gradient.to(call.key.dtype).contiguous()
    on_ramp = torch.where((call.m > 0) & (call.left <= 1), (call.m * ramp).reciprocal(), 0.0) if needs[3] else None
    generator = chance(dropout, seed, query.device)
    for tile in tiles(call.ends, heads, block, query.device):
        here, there = (slice(tile.first, tile.last), tile.heads), (tile.rows, tile.heads)
        part, above = call.query[here], gradient[here]  # (G, H, T, D)
        keys, values = by_head(call.key, tile), by_head(call.value, tile)  # (G, H, S, D)
        window = None if call.table is None else Window(call, tile)
        weight = weights(call, tile, part, keys, window)
        weight_grad = above @ values.transpose(-1, -2)  # (G, H, T, S)
        factor = dropped(weight, dropout, generator)
        if factor is not None:
            weight_grad *= factor
        used = weight if factor is None else weight * factor
        grad_value[there] = unpadded(tile, (used.transpose(-1, -2) @ above).transpose(1, 2))
        score_grad = weight_grad  # (G, H, T, S), in its place
        torch.ops.aten._softmax_backward_data.out(weight_grad, weight, -1, weight.dtype, grad_input=score_grad)

        grad_query[here] = score_grad @ keys
        grad_key[there] = unpadded(tile, (score_grad.transpose(-1, -2) @ part).transpose(1, 2))
        if window is not None and grad_table is not None:
            terms = window.gradient(score_grad)  # (G, H, T, P + 2 T)
            grad_query[here] += terms @ window.table
            grad_table += terms.flatten(0, 2).T @ part.flatten(0, 2)
        if on_ramp is not None:  # 1 / (m R) where m depends on the span, else 0
            faded, share = within(call.faded, tile)
            if tile.last == tile.first + 1:
                by_key = score_grad[0].index_select(-1, faded).permute(2, 0, 1)  # (n, H, T)
            else:
                by_key = score_grad.permute(0, 3, 1, 2).flatten(0, 1).index_select(0, faded)  # (n, H, T)
            by_key = by_key if span.shape[1] > 1 else by_key.sum(1, keepdim=True)
            rows = call.faded.rows[share]
            of_span = grad_span[:, tile.heads] if span.shape[1] > 1 else grad_span  # (N, H or 1)
            of_span.index_add_(0, rows, (by_key * of_heads(on_ramp[share], tile)).sum(-1))
        if needs[5]:
            grad_bias[there] = unpadded(tile, score_grad.sum(-2).transpose(1, 2))

    found = [grad_query / size**0.5, grad_key, grad_value, grad_span.sum_to_size(span.shape), None, None]
    if position is not None:
        found[4] = torch.zeros_like(position, dtype=call.key.dtype)
        if grad_table is not None:
            inner = grad_table[block : len(grad_table) - block].flip(0)  # (P, D)
            found[4][: len(inner)] = inner
    if bias is not None:
        found[5] = grad_bias.sum_to_size(bias.shape)
    wanted = (query, key, value, span, position, bias)
    return tuple(each.to(like.dtype) if need else None for each, like, need in zip(found, wanted, needs, strict=True))
