"""The Triton kernels of `triton_backend`, whose docstring has the equations.

    N, T, P             number of keys of all samples, of queries of a sample, of positions
    H, HEAD_DIM         heads, D; BLOCK_D is D padded to a power of 2
    BLOCK_M, BLOCK_N    queries and keys in a tile
    t                   index of each query of a tile in its block
    offs_n              row of each key of a tile, counted from `start`, the first row of its part or its tile
    m, m_i, l_i         the soft mask; the running maximum and the running sum of each query's softmax

Scores are in units of log 2, as exp2 is faster than exp.
"""

import math
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


# fmt: off
def jit(function: Callable) -> Any:
    """triton.jit, without another compilation of a kernel where the seed or N is 1 or a multiple of 16."""
    return triton.jit(function, do_not_specialize=["seed", "N"])


@jit
def load_rows(ptr, rows, mask, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (rows, BLOCK_D), with 0 beyond HEAD_DIM and in rows that are masked out."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs = rows.to(tl.int64)[:, None] * stride + offs_d
    return tl.load(ptr + offs, mask=mask[:, None] & (offs_d < HEAD_DIM), other=0.0)


@jit
def store_rows(ptr, rows, mask, stride, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask, offs = mask[:, None] & (offs_d < HEAD_DIM), rows.to(tl.int64)[:, None] * stride + offs_d
    tl.store(ptr + offs, values.to(ptr.dtype.element_ty), mask=mask)


@jit
def load_query_mask(span_mask, offs_m, sample, T):
    """Return t and max_age of each query. Where offs_m is not below T, t is so large that no key is visible."""
    t = tl.where(offs_m < T, offs_m, 2**30)
    max_age = t
    if span_mask.max_age is not None:
        max_age = tl.load(span_mask.max_age + sample * T + t, mask=t < T, other=-(2**30))
    return t, max_age


@jit
def load_key_mask(span_mask, start, offs_n, mask, head, N):
    """Return age, first_query, end_query and bias of each key. No query sees a key that is masked out."""
    offs = head * N + start
    age = tl.load(span_mask.age + start + offs_n, mask=mask, other=2**30)
    first_query = tl.load(span_mask.first_query + start + offs_n, mask=mask, other=2**30)
    end_query = tl.load(span_mask.end_query + offs + offs_n, mask=mask, other=0.0)
    bias = end_query
    if span_mask.bias is not None:
        bias = tl.load(span_mask.bias + offs + offs_n, mask=mask, other=0.0)
    return age, first_query, end_query, bias


@jit
def visible_rows(span_mask, start, count, t, max_age, head, N, T, BLOCK: tl.constexpr = 512):
    """Return the range, among `count` rows of keys, outside which a tile of queries sees no key."""
    first_t, last_t, oldest = tl.min(t), tl.max(tl.where(t < T, t, 0)), tl.max(max_age)
    low, high = tl.full((BLOCK,), 2**30, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start_n in range(0, count, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        age, first_query, end_query, _ = load_key_mask(span_mask, start, offs_n, offs_n < count, head, N)
        visible = (end_query > first_t) & (first_query <= last_t)
        if span_mask.max_age is not None:
            visible = visible & (age <= oldest)
        low = tl.minimum(low, tl.where(visible, offs_n, 2**30))
        high = tl.maximum(high, tl.where(visible, offs_n + 1, 0))
    return tl.min(low), tl.max(high)


@jit
def is_visible(span_mask, t, max_age, age, first_query, end_query):
    visible = (end_query > t.to(tl.float32)) & (t >= first_query)
    if span_mask.max_age is not None:
        visible = visible & (age <= max_age)
    return visible


@jit
def rel_index(head, t, age, P, T, H: tl.constexpr):
    """Return, as (keys, queries), where rel of a sample has each pair's score, and whether it has one.

    Keys lead, as keys of consecutive ages are contiguous in rel.
    """
    distance = age[:, None] + t[None, :]
    return ((t * H + head) * P)[None, :] + (distance - 1), (distance >= 1) & (distance <= P) & (t < T)[None, :]


@jit
def masked_scores(span_mask, qk, t, max_age, age, first_query, end_query, bias, scale):
    """Return the scores, -inf where the key is invisible, and m; (queries, keys) or (keys, queries), as qk is."""
    score = qk * (scale * LOG2_E)
    if span_mask.bias is not None:
        score += bias
    m = tl.minimum(tl.maximum((end_query - t.to(tl.float32)) * (1 / span_mask.ramp), 0.0), 1.0)
    return tl.where(is_visible(span_mask, t, max_age, age, first_query, end_query), score, -float("inf")), m


@jit
def dropout_mask(t, rows, head, seed, dropout, T, H: tl.constexpr):
    """Return which weights to keep, by a random number for each query, head and row of a key."""
    return tl.rand(seed, rows * (H * T) + (head * T + t), 7) >= dropout  # 7 rounds of Philox are enough


@jit
def query_tile(span_mask, T, BLOCK_M: tl.constexpr):
    """Return the head and the sample of a program that loops over keys, and t and max_age of its queries."""
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, max_age = load_query_mask(span_mask, tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), sample, T)
    return head, sample, t, max_age


@jit
def part_range(span_mask, offsets_ptr, part, sample, t, max_age, head, N, T):
    """Return the first row of one part of a sample's keys, their number, and the range to loop over."""
    offsets_ptr = offsets_ptr + part * (tl.num_programs(2) + 1) + sample
    start = tl.load(offsets_ptr)
    count = (tl.load(offsets_ptr + 1) - start).to(tl.int32)
    low, high = visible_rows(span_mask, start, count, t, max_age, head, N, T)
    return start, count, low, high


@jit
def attn_scores(
    span_mask, q, t, max_age, k_ptr, start, offs_n, count, rel_ptr, head, scale, N, T, P,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Load the next keys for a tile of queries; return them, their mask, and the scores and m, (queries, keys)."""
    in_part = offs_n < count
    age, first_query, end_query, bias = load_key_mask(span_mask, start, offs_n, in_part, head, N)
    k = load_rows(k_ptr, offs_n, in_part, H * HEAD_DIM, HEAD_DIM, BLOCK_D)
    rel = tl.zeros((t.shape[0], offs_n.shape[0]), tl.float32)  # the dot adds to it, so that scores keep its layout
    if rel_ptr is not None and tl.min(age) + tl.min(t) <= P:
        offs_rel, in_table = rel_index(head, t, age, P, T, H)
        rel = tl.trans(tl.load(rel_ptr + offs_rel, mask=in_table, other=0.0)).to(tl.float32)
    qk = tl.dot(q, tl.trans(k), rel, input_precision="ieee")
    score, m = masked_scores(
        span_mask, qk, t[:, None], max_age[:, None],
        age[None, :], first_query[None, :], end_query[None, :], bias[None, :], scale,
    )
    return k, age, first_query, end_query, score, m


@jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    span_mask, offsets_ptr, rel_ptr, scale, dropout, seed, N, T, P,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_DROPOUT: tl.constexpr, NUM_PARTS: tl.constexpr,
):
    head, sample, t, max_age = query_tile(span_mask, T, BLOCK_M)
    q_rows = (sample * T + t) * H + head  # of query and out
    q = load_rows(q_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
    if rel_ptr is not None:
        rel_ptr += sample * T * H * P

    m_i = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(NUM_PARTS):
        start, count, low, high = part_range(span_mask, offsets_ptr, part, sample, t, max_age, head, N, T)
        offs_k = (start * H + head) * HEAD_DIM  # of the part's first key
        for start_n in range(low, high, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            _, _, _, _, score, m = attn_scores(
                span_mask, q, t, max_age, k_ptr + offs_k, start, offs_n, count,
                rel_ptr, head, scale, N, T, P, H, HEAD_DIM, BLOCK_D,
            )
            m_ij = tl.maximum(m_i, tl.max(score, 1))
            finite_max = tl.where(m_ij == -float("inf"), 0.0, m_ij)
            weight, rescale = m * tl.exp2(score - finite_max[:, None]), tl.exp2(m_i - finite_max)
            l_i = l_i * rescale + tl.sum(weight, 1)
            if USE_DROPOUT:
                keep = dropout_mask(t[:, None], (start + offs_n)[None, :], head, seed, dropout, T, H)
                weight = tl.where(keep, weight, 0.0)
            v = load_rows(v_ptr + offs_k, offs_n, offs_n < count, H * HEAD_DIM, HEAD_DIM, BLOCK_D)
            acc = tl.dot(weight.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            m_i = m_ij

    l_i = tl.where(l_i == 0, 1.0, l_i)  # for queries that see no key
    store_rows(out_ptr, q_rows, t < T, HEAD_DIM, acc / (l_i * (1 - dropout))[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (sample * H + head) * T + t, (m_i + tl.log2(l_i)) / LOG2_E, mask=t < T)


@jit
def backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, drel_ptr,
    span_mask, offsets_ptr, rel_ptr, scale, dropout, seed, N, T, P,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_DROPOUT: tl.constexpr, NUM_PARTS: tl.constexpr,
):
    head, sample, t, max_age = query_tile(span_mask, T, BLOCK_M)
    q_rows, lse_rows = (sample * T + t) * H + head, (sample * H + head) * T + t
    q = load_rows(q_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
    do = load_rows(do_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + lse_rows, delta, mask=t < T)
    lse = tl.load(lse_ptr + lse_rows, mask=t < T, other=0.0) * LOG2_E
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    if rel_ptr is not None:
        rel_ptr, drel_ptr = rel_ptr + sample * T * H * P, drel_ptr + sample * T * H * P

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(NUM_PARTS):
        start, count, low, high = part_range(span_mask, offsets_ptr, part, sample, t, max_age, head, N, T)
        offs_k = (start * H + head) * HEAD_DIM  # of the part's first key
        for start_n in range(low, high, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k, age, first_query, end_query, score, m = attn_scores(
                span_mask, q, t, max_age, k_ptr + offs_k, start, offs_n, count,
                rel_ptr, head, scale, N, T, P, H, HEAD_DIM, BLOCK_D,
            )
            v = load_rows(v_ptr + offs_k, offs_n, offs_n < count, H * HEAD_DIM, HEAD_DIM, BLOCK_D)
            dweight = tl.dot(do, tl.trans(v), input_precision="ieee")
            if USE_DROPOUT:
                keep = dropout_mask(t[:, None], (start + offs_n)[None, :], head, seed, dropout, T, H)
                dweight = tl.where(keep, dweight / (1 - dropout), 0.0)
            dscore = m * tl.exp2(score - lse[:, None]) * (dweight - delta[:, None]) * scale
            dscore = dscore.to(k.dtype)
            if rel_ptr is not None and tl.min(age) + tl.min(t) <= P:
                offs_rel, in_table = rel_index(head, t, age, P, T, H)
                in_table &= is_visible(
                    span_mask, t[None, :], max_age[None, :], age[:, None], first_query[:, None], end_query[:, None]
                )
                tl.store(drel_ptr + offs_rel, tl.trans(dscore), mask=in_table)
            dq = tl.dot(dscore, k, dq, input_precision="ieee")
    store_rows(dq_ptr, q_rows, t < T, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)


@jit
def backward_dkv_kernel(
    tile_sample_ptr, tile_start_ptr, tile_end_ptr,
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dspan_ptr, dbias_ptr,
    span_mask, rel_ptr, scale, dropout, seed, N, T, P,
    H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, USE_DROPOUT: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.load(tile_sample_ptr + tl.program_id(0))
    start, offs_n = tl.load(tile_start_ptr + tl.program_id(0)), tl.arange(0, BLOCK_N)
    in_part = start + offs_n < tl.load(tile_end_ptr + tl.program_id(0))
    age, first_query, end_query, bias = load_key_mask(span_mask, start, offs_n, in_part, head, N)
    offs_k = (start * H + head) * HEAD_DIM  # of the tile's first key
    k = load_rows(k_ptr + offs_k, offs_n, in_part, H * HEAD_DIM, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + offs_k, offs_n, in_part, H * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if rel_ptr is not None:
        rel_ptr += sample * T * H * P

    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dspan, dbias = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    end_m = tl.ceil(tl.minimum(tl.maximum(tl.max(end_query), 0.0), T)).to(tl.int32)
    for start_m in range(tl.maximum(tl.min(first_query), 0), end_m, BLOCK_M):
        t, max_age = load_query_mask(span_mask, start_m + tl.arange(0, BLOCK_M), sample, T)
        q_rows, lse_rows = (sample * T + t) * H + head, (sample * H + head) * T + t
        q = load_rows(q_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
        rel = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # (keys, queries), like all matrices below
        if rel_ptr is not None and tl.min(age) + start_m <= P:
            offs_rel, in_table = rel_index(head, t, age, P, T, H)
            rel = tl.load(rel_ptr + offs_rel, mask=in_table, other=0.0).to(tl.float32)
        qk = tl.dot(k, tl.trans(q), rel, input_precision="ieee")
        score, m = masked_scores(
            span_mask, qk, t[None, :], max_age[None, :],
            age[:, None], first_query[:, None], end_query[:, None], bias[:, None], scale,
        )
        lse = tl.load(lse_ptr + lse_rows, mask=t < T, other=0.0) * LOG2_E
        u = tl.exp2(score - tl.where(lse == -float("inf"), 0.0, lse)[None, :])
        weight = m * u
        do = load_rows(do_ptr, q_rows, t < T, HEAD_DIM, HEAD_DIM, BLOCK_D)
        dweight = tl.dot(v, tl.trans(do), input_precision="ieee")
        if USE_DROPOUT:
            keep = dropout_mask(t[None, :], (start + offs_n)[:, None], head, seed, dropout, T, H)
            weight = tl.where(keep, weight / (1 - dropout), 0.0)
            dweight = tl.where(keep, dweight / (1 - dropout), 0.0)
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="ieee")
        dm = u * (dweight - tl.load(delta_ptr + lse_rows, mask=t < T, other=0.0)[None, :])
        if dspan_ptr is not None:
            on_ramp = end_query[:, None] - t[None, :].to(tl.float32) <= span_mask.ramp
            dspan += tl.sum(tl.where(on_ramp, dm, 0.0), 1)
        if dbias_ptr is not None:
            dbias += tl.sum(m * dm, 1)
        dk = tl.dot((m * dm * scale).to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_ptr + offs_k, offs_n, in_part, H * HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + offs_k, offs_n, in_part, H * HEAD_DIM, dv, HEAD_DIM, BLOCK_D)
    if dspan_ptr is not None:
        tl.store(dspan_ptr + (start + offs_n) * H + head, dspan / span_mask.ramp, mask=in_part)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + (start + offs_n) * H + head, dbias, mask=in_part)
