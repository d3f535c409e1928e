"""Packed span attention as fused Triton kernels, forward and backward: no matrix of scores is ever in memory.

In the time of the block's queries, a key is seen from `first` on and before `end`:
    first = born - age                         end = span - age + ramp      m = clamp((end - t) / ramp, 0, 1)
    seen:   first <= t < end and age <= limit, which is reach_t - t         distance = age + t

Forward, one program a tile of queries, which walks the keys with a running maximum:
    score = (q . k + rel) / sqrt(D) + bias     rel = q . p[distance - 1], 0 beyond the table
    lse   = log sum m exp(score)               out = sum m exp(score - lse) v

Backward makes the scores anew. With g the gradient of out, u = exp(score - lse), delta = g . out:
    dA = g . v                                 dS = m u (dA - delta)
    dq = sum_i dS (k + p) / sqrt(D)            dk = sum_t dS q / sqrt(D)        dv = sum_t m u g
    d bias = sum_t dS                          d span = sum_t u (dA - delta) / ramp  where 0 < end - t <= ramp
m multiplies after the exp and is never divided by: a memory about to expire still has its gradient. Dropout drops the
same m u in dv, and dA, by numbers drawn again from the seed and the place of the score.

dq, a sum over keys, has a kernel that walks keys; dk, dv and d span, sums over queries, have one that walks queries.
No two programs add to one number, so two calls give the same bits. What a tile walks is cut to the range in which it
sees anything, found from the firsts and ends themselves, in whatever order they stand: what lies at either end of it
and has expired, or is yet to come, is skipped.

Ages in a tile are scattered, so q . p is no product of tiles. It is made outside, by one product of matrices for all
distances, rel (B, T, H, P); the kernels pick from it, in those tiles alone that the table reaches. Its gradient comes
back in the same shape, for dp = drel^T q and dq += drel p. Both exist only within a call, for a part of the samples at
a time (TRANSIENT). A pick's gradient is stored, not added, so a query must not see two keys of its sample at the same
distance. None does: ages differ, except a pooled memory's (born > 1), whose distances begin where those of an unpooled
one of its age have ended.
"""

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from . import packed_triton_kernels as kernels
except ImportError:  # no Triton, as `available` says
    kernels = None  # type: ignore[assignment]


class Tile(NamedTuple):
    """What one program holds at a time; its warps share the registers, its stages load ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# (bytes of an element, head size up to): fits in 99 kB, and up to 128 few bytes spill on sm_90. Of two dots in a row
# all warps stand along the rows, 16 each: where these are fewer, warps do the same twice.
FORWARD = {
    (2, 128): Tile(128, 32, 8, 2),
    (2, 256): Tile(64, 32, 8, 1),
    (4, 64): Tile(32, 16, 4, 2),
    (4, 256): Tile(16, 16, 8, 1),
}
FORWARD_FEW = FORWARD | {(2, 128): Tile(16, 64, 2, 2)}  # queries, as in generating and acting
BACKWARD_QUERIES = FORWARD | {(2, 64): Tile(128, 32, 8, 2), (2, 128): Tile(64, 32, 4, 2)}
BACKWARD_KEYS = FORWARD | {(2, 64): Tile(32, 128, 8, 2), (2, 128): Tile(32, 64, 4, 2), (2, 256): Tile(32, 32, 8, 1)}
TRANSIENT = 2**28  # elements of rel at a time, if one sample has not more
FAR = 2**29  # timesteps: farther than anything is seen


class Fading(NamedTuple):
    """Who sees what, in the time of the block's queries."""

    age: Tensor  # (N,) int32
    first: Tensor  # (N,) int32
    end: Tensor  # (H, N) float32
    limit: Tensor | None  # (B, T) int32
    bias: Tensor | None  # (H, N) float32, times log2(e)
    ramp: float


def available() -> bool:
    """Whether the kernels can run here: on a GPU that Triton has matrix products for, or in Triton's interpreter."""
    if kernels is None or os.environ.get("TRITON_INTERPRET") == "1":
        return kernels is not None
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and launches()


@cache
def launches() -> bool:
    """Whether Triton has what it needs to launch anything. Says on stderr what it lacks."""
    try:
        kernels.triton.runtime.driver.active.get_current_device()  # made of C, with a compiler and Python's headers
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"expire-span: attention is slow, as Triton cannot be used: {why}", file=sys.stderr)
        return False
    return True


# fmt: off
def forward(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, age: Tensor, span: Tensor, ramp: float,
    position: Tensor | None, rows: Tensor | None, reach: Tensor | None, bias: Tensor | None, born: Tensor | None,
    dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D) in query's dtype, and lse (B, H, T) float32: -inf for a query that sees nothing.

    The arguments are those of `packed_span_attention`. query, key and value have one dtype: float32 is computed in
    float32, bf16 and fp16 are multiplied as they are and summed in float32.
    """
    query = _by_time(query)  # (B, T, H, D)
    samples, steps, heads, _ = query.shape
    table, fading = _table(position, rows, query), _fading(age, span, ramp, reach, bias, born, heads)
    shared = _shared(key, value, dropout, seed)
    out, lse = torch.empty_like(query), query.new_empty(samples, heads, steps, dtype=torch.float32)
    for part in _parts(query, table):
        own = _own(part, query, offsets, fading, table)
        tiles = FORWARD if steps > 16 else FORWARD_FEW
        _launch(kernels.forward, tiles, **own, **shared, out=out[part], lse=lse[part])
    return out.transpose(1, 2), lse


def backward(
    gradient: Tensor, out: Tensor, lse: Tensor,
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, age: Tensor, span: Tensor, ramp: float,
    position: Tensor | None, rows: Tensor | None, reach: Tensor | None, bias: Tensor | None, born: Tensor | None,
    dropout: float, seed: int, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, span, position and bias, each if it is needed, from forward's out and lse."""
    query, gradient, out = _by_time(query), _by_time(gradient), _by_time(out)  # (B, T, H, D)
    table, fading = _table(position, rows, query), _fading(age, span, ramp, reach, bias, born, key.shape[1])
    shared = _shared(key, value, dropout, seed)
    d_query, delta = torch.empty_like(query), torch.empty_like(lse)
    d_key, d_value = torch.empty_like(shared["key"]), torch.empty_like(shared["value"])
    d_span, d_bias = (lse.new_empty(key.shape[:2]) if needs[i] else None for i in (3, 5))  # (N, H), summed at the end
    d_position = None
    if position is not None and needs[4]:
        d_position = lse.new_zeros((len(position) if rows is None else len(rows), position.shape[1]))
    for part in _parts(query, table):
        own = _own(part, query, offsets, fading, table)
        own |= {"gradient": gradient[part], "lse": lse[part], "delta": delta[part]}
        d_rel = None if table is None else torch.zeros_like(own["rel"])
        more: dict[str, Any] = {"out": out[part], "d_query": d_query[part], "d_rel": d_rel}
        _launch(kernels.backward_queries, BACKWARD_QUERIES, **own, **shared, **more)  # makes delta for the next one
        if needs[1] or needs[2] or needs[3] or needs[5]:
            more = {"d_key": d_key, "d_value": d_value, "d_span": d_span, "d_bias": d_bias}
            _launch(kernels.backward_keys, BACKWARD_KEYS, **own, **shared, **more)
        if table is not None and d_rel is not None:
            d_rel = d_rel.flatten(0, 2)  # (B' T H, P)
            d_query[part].flatten(0, 2).add_(_product(d_rel, table))
            if d_position is not None:
                d_position += _product(d_rel.T, query[part].flatten(0, 2))
    if position is not None and rows is not None and d_position is not None:  # summed in the same order every time
        lengths = torch.searchsorted(rows, torch.arange(len(position) + 1, device=rows.device)).diff()
        d_position = torch.segment_reduce(d_position, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)

    def like(given: Tensor | None, summed: Tensor | None) -> Tensor | None:
        return None if given is None or summed is None else summed.sum_to_size(given.shape).to(given.dtype)

    rest = like(span, d_span), like(position, d_position), like(bias, d_bias)
    made = (d_query.transpose(1, 2), d_key, d_value, *rest)
    return tuple(gradient if needed else None for gradient, needed in zip(made, needs, strict=True))
# fmt: on


def _by_time(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H, D), as a projection leaves it in memory: mostly no copy."""
    return tensor.transpose(1, 2).contiguous()


def _table(position: Tensor | None, rows: Tensor | None, query: Tensor) -> Tensor | None:
    """(P, D): a row for every distance."""
    if position is None or len(position) == 0:
        return None
    return (position if rows is None else position[rows]).to(query.dtype)


def _shared(key: Tensor, value: Tensor, dropout: float, seed: int) -> dict[str, Any]:
    return {"key": key.contiguous(), "value": value.contiguous(), "dropout": float(dropout), "seed": seed}


def _parts(query: Tensor, table: Tensor | None) -> Iterator[slice]:
    """The samples whose rel is in memory at the same time."""
    samples, steps, heads, _ = query.shape
    picks = 1 if table is None else max(1, steps * heads * len(table))  # one sample's
    if picks >= 2**31:
        sizes = f"{steps} queries, {heads} heads, {picks // steps // heads} positions"
        raise ValueError(f"too many for one sample, their product must stay below 2^31: {sizes}")
    each = max(1, samples if table is None else TRANSIENT // picks)
    return (slice(first, min(first + each, samples)) for first in range(0, samples, each))


def _own(part: slice, query: Tensor, offsets: Tensor, fading: Fading, table: Tensor | None) -> dict[str, Any]:
    """What the kernels get of these samples. Keys are not cut: the offsets say which rows are theirs."""
    return {
        "query": query[part],
        "offsets": torch.atleast_2d(offsets)[:, part.start : part.stop + 1].contiguous(),
        "fading": fading._replace(limit=None if fading.limit is None else fading.limit[part]),
        "rel": None if table is None else _product(query[part], table.T),  # (B', T, H, P)
    }


def _product(first: Tensor, second: Tensor) -> Tensor:
    """As it is: autocast would round it, in forward and not in backward, say."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def _fading(
    age: Tensor,
    span: Tensor,
    ramp: float,
    reach: Tensor | None,
    bias: Tensor | None,
    born: Tensor | None,
    heads: int,
) -> Fading:
    age = age.clamp(-FAR, FAR)
    first = (1 if born is None else born.clamp(-FAR, FAR)) - age
    end = (span - age[:, None] + ramp).clamp(max=FAR)  # (N, H or 1)
    limit = None
    if reach is not None:
        limit = (reach - torch.arange(reach.shape[1], device=reach.device)).clamp(-FAR, FAR).int().contiguous()

    def by_head(rows: Tensor) -> Tensor:  # (N or 1, H or 1) -> (H, N): a tile's keys lie side by side
        return rows.float().expand(len(age), heads).T.contiguous()

    bias = None if bias is None else by_head(bias * math.log2(math.e))
    return Fading(age.int(), first.int(), by_head(end), limit, bias, float(ramp))


def _launch(kernel: Any, tiles: dict[tuple[int, int], Tile], query: Tensor, **arguments: Any) -> None:
    (samples, steps, heads, size), key, rel = query.shape, arguments["key"], arguments["rel"]
    width = max(16, 1 << (size - 1).bit_length())
    kinds = [kind for kind in tiles if kind[0] == query.element_size() and width <= kind[1]]
    if not kinds:
        raise ValueError(f"kernel='triton' takes heads of up to 256 in 2 or 4 bytes, got {size} in {query.dtype}")
    tile = tiles[min(kinds)]
    grid = (-(-steps // tile.queries), heads, samples)
    if kernel is kernels.backward_keys:
        arguments |= _key_tiles(arguments.pop("offsets"), len(key), tile.keys)
        grid = (len(arguments["row_of"]), heads, 1)
    else:
        arguments["PARTS"] = len(arguments["offsets"])
    if 0 in grid:
        return
    sizes = {"N": len(key), "T": steps, "P": 0 if rel is None else rel.shape[3], "scale": size**-0.5}
    sizes |= {"HEADS": heads, "SIZE": size, "WIDTH": width, "QUERIES": tile.queries, "KEYS": tile.keys}
    sizes |= {"DROPS": arguments["dropout"] > 0, "num_warps": tile.warps, "num_stages": tile.stages}
    with torch.cuda.device_of(query):
        kernel[grid](query=query, **arguments, **sizes)


def _key_tiles(offsets: Tensor, total: int, size: int) -> dict[str, Tensor]:
    """The sample of each tile of keys, its first row and the row where its part ends, (tiles,) each.

    They are found on the device. A part's last tile may be part full. The host knows no more than the most tiles that
    there can be, so the last few may begin beyond the last part's end, where they are empty.
    """
    tiles = ((offsets.diff() + size - 1) // size).flatten()  # (parts B,)
    ends = tiles.cumsum(0)
    number = torch.arange(-(-total // size) + len(tiles), device=offsets.device)
    part = torch.searchsorted(ends, number, right=True).clamp(max=len(tiles) - 1)  # which part of which sample
    row = offsets[:, :-1].flatten()[part] + (number - ends[part] + tiles[part]) * size
    return {"sample_of": part % (offsets.shape[1] - 1), "row_of": row, "end_of": offsets[:, 1:].flatten()[part]}
