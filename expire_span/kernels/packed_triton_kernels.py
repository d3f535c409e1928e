"""The Triton kernels of `packed_triton`, which says what they compute. Tensors come as pointers to their first number.

    N, T, P         keys of all samples, queries of a sample, positions
    HEADS, SIZE     H, D; WIDTH: D padded to a power of 2
    QUERIES, KEYS   what one program holds at a time
    rows, lines     where keys lie, counted from the sample's or the tile's first; where queries lie, (B, T, H)
"""

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))  # all exponentials are powers of 2


# fmt: off
def jit(function: Callable) -> Any:
    """triton.jit, but no further version of a kernel where a seed or N is 1 or a multiple of 16."""
    return triton.jit(function, do_not_specialize=["seed", "N"])


@jit
def load(pointer, rows, inside, stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH): the SIZE numbers of each row, then 0; all 0 for rows that are not inside."""
    column = tl.arange(0, WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * stride + column
    return tl.load(pointer + at, mask=inside[:, None] & (column < SIZE), other=0.0)


@jit
def store(pointer, rows, inside, stride, vectors, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)[None, :]
    mask, at = inside[:, None] & (column < SIZE), rows.to(tl.int64)[:, None] * stride + column
    tl.store(pointer + at, vectors.to(pointer.dtype.element_ty), mask=mask)


@jit
def queries_of(fading, number, sample, T):
    """Each query's t, beyond all time for those that are not, and the age up to which it sees."""
    t = tl.where(number < T, number, 2**30)
    limits = t
    if fading.limit is not None:
        limits = tl.load(fading.limit + sample * T + t, mask=t < T, other=-(2**30))
    return t, limits


@jit
def keys_of(fading, start, rows, inside, head, N):
    """Each key's age, first, end and bias. No query sees those that are not inside."""
    at = head * N + start
    ages = tl.load(fading.age + start + rows, mask=inside, other=2**30)
    firsts = tl.load(fading.first + start + rows, mask=inside, other=2**30)
    ends = tl.load(fading.end + at + rows, mask=inside, other=0.0)
    biases = ends
    if fading.bias is not None:
        biases = tl.load(fading.bias + at + rows, mask=inside, other=0.0)
    return ages, firsts, ends, biases


@jit
def rows_seen(fading, start, count, t, limits, head, N, T, SCAN: tl.constexpr = 512):
    """From which of some rows on, and up to which, a tile of queries sees any key."""
    earliest, latest, oldest = tl.min(t), tl.max(tl.where(t < T, t, 0)), tl.max(limits)
    low, high = tl.full((SCAN,), 2**30, tl.int32), tl.zeros((SCAN,), tl.int32)
    for row in range(0, count, SCAN):
        rows = row + tl.arange(0, SCAN)
        ages, firsts, ends, _ = keys_of(fading, start, rows, rows < count, head, N)
        seen = (ends > earliest) & (firsts <= latest)
        if fading.limit is not None:
            seen = seen & (ages <= oldest)
        low, high = tl.minimum(low, tl.where(seen, rows, 2**30)), tl.maximum(high, tl.where(seen, rows + 1, 0))
    return tl.min(low), tl.max(high)


@jit
def is_seen(fading, t, limits, ages, firsts, ends):
    seen = (ends > t.to(tl.float32)) & (t >= firsts)
    if fading.limit is not None:
        seen = seen & (ages <= limits)
    return seen


@jit
def in_table(head, t, ages, P, T, HEADS: tl.constexpr):
    """(keys, queries): the place of a pair's distance in its sample's rel, and whether the table has it.

    Keys lead, as they lie next to each other in rel if their ages do.
    """
    distance = ages[:, None] + t[None, :]
    return ((t * HEADS + head) * P)[None, :] + (distance - 1), (distance >= 1) & (distance <= P) & (t < T)[None, :]


@jit
def scores_of(fading, product, t, limits, ages, firsts, ends, biases, scale):
    """Either way round: the score in units of log 2, -inf where unseen, and m."""
    score = product * (scale * LOG2_E)
    if fading.bias is not None:
        score += biases
    m = tl.minimum(tl.maximum((ends - t.to(tl.float32)) * (1 / fading.ramp), 0.0), 1.0)
    return tl.where(is_seen(fading, t, limits, ages, firsts, ends), score, -float("inf")), m


@jit
def is_kept(t, rows, head, seed, dropout, T, HEADS: tl.constexpr):
    """Whether a weight stays: a random number for each query, head and row of a key. Philox needs 7 rounds for it."""
    return tl.rand(seed, rows * (HEADS * T) + (head * T + t), 7) >= dropout


@jit
def tile_of_queries(fading, T, QUERIES: tl.constexpr):
    """Of a program that walks keys: its head, its sample and its queries."""
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, limits = queries_of(fading, tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), sample, T)
    return head, sample, t, limits


@jit
def keys_to_walk(fading, offsets, part, sample, t, limits, head, N, T):
    """Of one part of a sample's keys: the first, their number, and the range in which any is seen."""
    own = offsets + part * (tl.num_programs(2) + 1) + sample
    start = tl.load(own)
    count = (tl.load(own + 1) - start).to(tl.int32)
    low, high = rows_seen(fading, start, count, t, limits, head, N, T)
    return start, count, low, high


@jit
def meet(
    fading, queries, t, limits, key, start, rows, count, rel, head, scale, N, T, P,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):
    """The next keys for a tile of queries, and its scores and m with them: (queries, keys)."""
    inside = rows < count
    ages, firsts, ends, biases = keys_of(fading, start, rows, inside, head, N)
    keys = load(key, rows, inside, HEADS * SIZE, SIZE, WIDTH)
    term = tl.zeros((t.shape[0], rows.shape[0]), tl.float32)  # what the dot adds to, so that scores keep its layout
    if rel is not None and tl.min(ages) + tl.min(t) <= P:
        place, told = in_table(head, t, ages, P, T, HEADS)
        term = tl.trans(tl.load(rel + place, mask=told, other=0.0)).to(tl.float32)
    product = tl.dot(queries, tl.trans(keys), term, input_precision="ieee")
    score, m = scores_of(
        fading, product, t[:, None], limits[:, None],
        ages[None, :], firsts[None, :], ends[None, :], biases[None, :], scale,
    )
    return keys, ages, firsts, ends, score, m


@jit
def forward(
    query, key, value, out, lse,
    fading, offsets, rel, scale, dropout, seed, N, T, P,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr, PARTS: tl.constexpr,
):
    head, sample, t, limits = tile_of_queries(fading, T, QUERIES)
    lines = (sample * T + t) * HEADS + head  # rows of query and out
    queries = load(query, lines, t < T, SIZE, SIZE, WIDTH)
    if rel is not None:
        rel += sample * T * HEADS * P

    highest = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    summed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for part in range(PARTS):
        start, count, low, high = keys_to_walk(fading, offsets, part, sample, t, limits, head, N, T)
        own = (start * HEADS + head) * SIZE  # the part's first key
        for row in range(low, high, KEYS):
            rows = row + tl.arange(0, KEYS)
            _, _, _, _, score, m = meet(
                fading, queries, t, limits, key + own, start, rows, count, rel, head, scale, N, T, P, HEADS, SIZE, WIDTH
            )
            higher = tl.maximum(highest, tl.max(score, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)
            weight, shrunk = m * tl.exp2(score - finite[:, None]), tl.exp2(highest - finite)
            total = total * shrunk + tl.sum(weight, 1)
            if DROPS:
                kept = is_kept(t[:, None], (start + rows)[None, :], head, seed, dropout, T, HEADS)
                weight = tl.where(kept, weight, 0.0)
            values = load(value + own, rows, rows < count, HEADS * SIZE, SIZE, WIDTH)
            summed = tl.dot(weight.to(values.dtype), values, summed * shrunk[:, None], input_precision="ieee")
            highest = higher

    some = tl.where(total == 0, 1.0, total)
    store(out, lines, t < T, SIZE, summed / (some * (1 - dropout))[:, None], SIZE, WIDTH)
    tl.store(lse + (sample * HEADS + head) * T + t, (highest + tl.log2(some)) / LOG2_E, mask=t < T)


@jit
def backward_queries(
    query, key, value, out, gradient, lse, delta, d_query, d_rel,
    fading, offsets, rel, scale, dropout, seed, N, T, P,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr, PARTS: tl.constexpr,
):
    head, sample, t, limits = tile_of_queries(fading, T, QUERIES)
    lines, line = (sample * T + t) * HEADS + head, (sample * HEADS + head) * T + t  # rows of query, and of lse
    queries = load(query, lines, t < T, SIZE, SIZE, WIDTH)
    gradients = load(gradient, lines, t < T, SIZE, SIZE, WIDTH)
    outs = load(out, lines, t < T, SIZE, SIZE, WIDTH)
    deltas = tl.sum(gradients.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(delta + line, deltas, mask=t < T)
    norm = tl.load(lse + line, mask=t < T, other=0.0) * LOG2_E
    norm = tl.where(norm == -float("inf"), 0.0, norm)
    if rel is not None:
        rel, d_rel = rel + sample * T * HEADS * P, d_rel + sample * T * HEADS * P

    summed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for part in range(PARTS):
        start, count, low, high = keys_to_walk(fading, offsets, part, sample, t, limits, head, N, T)
        own = (start * HEADS + head) * SIZE  # the part's first key
        for row in range(low, high, KEYS):
            rows = row + tl.arange(0, KEYS)
            keys, ages, firsts, ends, score, m = meet(
                fading, queries, t, limits, key + own, start, rows, count, rel, head, scale, N, T, P, HEADS, SIZE, WIDTH
            )
            values = load(value + own, rows, rows < count, HEADS * SIZE, SIZE, WIDTH)
            d_weight = tl.dot(gradients, tl.trans(values), input_precision="ieee")
            if DROPS:
                kept = is_kept(t[:, None], (start + rows)[None, :], head, seed, dropout, T, HEADS)
                d_weight = tl.where(kept, d_weight / (1 - dropout), 0.0)
            d_score = m * tl.exp2(score - norm[:, None]) * (d_weight - deltas[:, None]) * scale
            d_score = d_score.to(keys.dtype)
            if rel is not None and tl.min(ages) + tl.min(t) <= P:
                place, told = in_table(head, t, ages, P, T, HEADS)
                told &= is_seen(fading, t[None, :], limits[None, :], ages[:, None], firsts[:, None], ends[:, None])
                tl.store(d_rel + place, tl.trans(d_score), mask=told)
            summed = tl.dot(d_score, keys, summed, input_precision="ieee")
    store(d_query, lines, t < T, SIZE, summed, SIZE, WIDTH)


@jit
def backward_keys(
    sample_of, row_of, end_of, query, key, value, gradient, lse, delta, d_key, d_value, d_span, d_bias,
    fading, rel, scale, dropout, seed, N, T, P,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPS: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.load(sample_of + tl.program_id(0))
    start, rows = tl.load(row_of + tl.program_id(0)), tl.arange(0, KEYS)
    inside = start + rows < tl.load(end_of + tl.program_id(0))
    ages, firsts, ends, biases = keys_of(fading, start, rows, inside, head, N)
    own = (start * HEADS + head) * SIZE  # the tile's first key
    keys = load(key + own, rows, inside, HEADS * SIZE, SIZE, WIDTH)
    values = load(value + own, rows, inside, HEADS * SIZE, SIZE, WIDTH)
    if rel is not None:
        rel += sample * T * HEADS * P

    summed_key, summed_value = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    summed_span, summed_bias = tl.zeros((KEYS,), tl.float32), tl.zeros((KEYS,), tl.float32)
    last = tl.ceil(tl.minimum(tl.maximum(tl.max(ends), 0.0), T)).to(tl.int32)  # from it on, no query sees any of them
    for step in range(tl.maximum(tl.min(firsts), 0), last, QUERIES):
        t, limits = queries_of(fading, step + tl.arange(0, QUERIES), sample, T)
        lines, line = (sample * T + t) * HEADS + head, (sample * HEADS + head) * T + t
        queries = load(query, lines, t < T, SIZE, SIZE, WIDTH)
        term = tl.zeros((KEYS, QUERIES), tl.float32)  # (keys, queries), as all below
        if rel is not None and tl.min(ages) + step <= P:
            place, told = in_table(head, t, ages, P, T, HEADS)
            term = tl.load(rel + place, mask=told, other=0.0).to(tl.float32)
        product = tl.dot(keys, tl.trans(queries), term, input_precision="ieee")
        score, m = scores_of(
            fading, product, t[None, :], limits[None, :],
            ages[:, None], firsts[:, None], ends[:, None], biases[:, None], scale,
        )
        norm = tl.load(lse + line, mask=t < T, other=0.0) * LOG2_E
        u = tl.exp2(score - tl.where(norm == -float("inf"), 0.0, norm)[None, :])
        weight = m * u
        gradients = load(gradient, lines, t < T, SIZE, SIZE, WIDTH)
        d_weight = tl.dot(values, tl.trans(gradients), input_precision="ieee")
        if DROPS:
            kept = is_kept(t[None, :], (start + rows)[:, None], head, seed, dropout, T, HEADS)
            weight = tl.where(kept, weight / (1 - dropout), 0.0)
            d_weight = tl.where(kept, d_weight / (1 - dropout), 0.0)
        summed_value = tl.dot(weight.to(gradients.dtype), gradients, summed_value, input_precision="ieee")
        slope = u * (d_weight - tl.load(delta + line, mask=t < T, other=0.0)[None, :])
        if d_span is not None:
            fades = ends[:, None] - t[None, :].to(tl.float32) <= fading.ramp
            summed_span += tl.sum(tl.where(fades, slope, 0.0), 1)
        if d_bias is not None:
            summed_bias += tl.sum(m * slope, 1)
        summed_key = tl.dot((m * slope * scale).to(queries.dtype), queries, summed_key, input_precision="ieee")
    store(d_key + own, rows, inside, HEADS * SIZE, summed_key, SIZE, WIDTH)
    store(d_value + own, rows, inside, HEADS * SIZE, summed_value, SIZE, WIDTH)
    if d_span is not None:
        tl.store(d_span + (start + rows) * HEADS + head, summed_span / fading.ramp, mask=inside)
    if d_bias is not None:
        tl.store(d_bias + (start + rows) * HEADS + head, summed_bias, mask=inside)
