"""The Triton backend for CUDA: packed span attention as fused kernels, which never store the matrix of scores.

In the block, whose queries are at t = 0, ..., T - 1, a key is visible from `first_query` on and before `end_query`:
    first_query = min_distance - age           end_query = span - age + ramp
    visible:  first_query <= t < end_query and age <= max_age, which is reach_t - t         distance = age + t
    m = clamp((end_query - t) / ramp, 0, 1)

Forward: a program has a tile of queries and loops over the keys with a running maximum.
    score = (q . k + rel) / sqrt(D) + bias     rel = q . p[distance - 1], 0 beyond the table
    lse   = log sum m exp(score)               out = sum m exp(score - lse) v

Backward recomputes the scores. With do the gradient of out, u = exp(score - lse) and delta = do . out:
    dweight = do . v                           dscore = m u (dweight - delta)
    dq = sum_i dscore (k + p) / sqrt(D)        dk = sum_t dscore q / sqrt(D)        dv = sum_t m u do
    dbias = sum_t dscore                       dspan = sum_t u (dweight - delta) / ramp  where 0 < end_query - t <= ramp
m multiplies after the exp, and nothing is divided by it, so that a memory about to expire still has its gradient.
Dropout draws the same mask for m u in dv and for dweight as in forward, from the seed and the place of the score.

dq is a sum over keys and has a kernel that loops over keys; dk, dv and dspan are sums over queries and have one that
loops over queries. No two programs add to the same number, so that every call gives the same bits. A tile loops only
over the range in which it sees anything, which it finds by reading first_query and end_query of all keys, in any
order: it skips the expired keys, and those yet to come, at either end.

The ages in a tile are scattered, so that q . p is no product of tiles. One matrix product before the kernels computes
it for every distance, rel (B, T, H, P), and the kernels gather from it, only in tiles within the table's reach. The
gradient comes back in the same shape, for dp = drel^T q and dq += drel p. Both exist only within a call, and for some
samples at a time (MAX_REL_ELEMENTS). The kernels store an element of drel and do not add to it, so a query must not see
two keys of its sample at the same distance. It never does: ages differ, except for pooled memories (min_distance > 1),
which are visible only from a distance on at which the unpooled memory of the same age has expired.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import DIFFERENTIABLE, AttentionInputs

try:
    from . import triton_kernels as kernels
except ImportError:  # Triton is not installed, see `available`
    kernels = None  # type: ignore[assignment]


class TileConfig(NamedTuple):
    """Sizes of a kernel's tiles, and how Triton compiles it."""

    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# By the bytes of an element and the largest head size. These fit into 99 kB of shared memory and, up to a head size of
# 128, spill few bytes on sm_90. Where a dot feeds another, Triton lays out all warps along the rows, 16 rows each: with
# fewer rows, several warps would do the same work.
FORWARD = {
    (2, 128): TileConfig(128, 32, 8, 2),
    (2, 256): TileConfig(64, 32, 8, 1),
    (4, 64): TileConfig(32, 16, 4, 2),
    (4, 256): TileConfig(16, 16, 8, 1),
}
FORWARD_DECODE = FORWARD | {(2, 128): TileConfig(16, 64, 2, 2)}  # few queries, as in generating and acting
BACKWARD_DQ = FORWARD | {(2, 64): TileConfig(128, 32, 8, 2), (2, 128): TileConfig(64, 32, 4, 2)}
BACKWARD_DKV = FORWARD | {
    (2, 64): TileConfig(32, 128, 8, 2),
    (2, 128): TileConfig(32, 64, 4, 2),
    (2, 256): TileConfig(32, 32, 8, 1),
}
MAX_REL_ELEMENTS = 2**28  # of rel in memory at a time, unless one sample has more
MAX_DISTANCE = 2**29  # timesteps; clamps all ages and distances to what an int32 holds


class SpanMask(NamedTuple):
    """Which query sees which key, and how faded: the input of the kernels from which they compute m."""

    age: Tensor  # (N,) int32
    first_query: Tensor  # (N,) int32
    end_query: Tensor  # (H, N) float32
    max_age: Tensor | None  # (B, T) int32
    bias: Tensor | None  # (H, N) float32, times log2(e)
    ramp: float


def available() -> bool:
    """Return whether the kernels can run here: on a GPU of compute capability 8.0 or more, or interpreted."""
    if kernels is None or os.environ.get("TRITON_INTERPRET") == "1":
        return kernels is not None
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and can_launch()


@cache
def can_launch() -> bool:
    """Return whether Triton can launch a kernel; print to stderr what it lacks."""
    try:
        kernels.triton.runtime.driver.active.get_current_device()  # compiles C, with a compiler and Python's headers
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"expire-span: attention is slow, as Triton cannot be used: {reason}", file=sys.stderr)
        return False
    return True


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Compute the attention.

    query, key and value have one dtype. float32 is multiplied in float32; bfloat16 and float16 are multiplied as they
    are and summed in float32.

    Returns:
        out (B, H, T, D) in the dtype of query, and lse (B, H, T) float32, -inf for a query that sees no key.

    Raises:
        ValueError: If the head size or the dtype is not supported, or one sample's rel is too large.
    """
    query = _time_first(inputs.query)  # (B, T, H, D)
    samples, block, heads, _ = query.shape
    table, span_mask = _position_table(inputs), _span_mask(inputs)
    shared = _shared_args(inputs)
    out, lse = torch.empty_like(query), query.new_empty(samples, heads, block, dtype=torch.float32)
    configs = FORWARD if block > 16 else FORWARD_DECODE
    for chunk in _sample_chunks(query, table):
        args = _chunk_args(chunk, query, inputs.offsets, span_mask, table)
        _launch(kernels.forward_kernel, configs, **args, **shared, out_ptr=out[chunk], lse_ptr=lse[chunk])
    return out.transpose(1, 2), lse


def backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs, needs_grad: Sequence[bool]
) -> list[Tensor | None]:
    """Compute the gradients of DIFFERENTIABLE from out and lse of `forward`, or None where needs_grad is False."""
    needed = dict(zip(DIFFERENTIABLE, needs_grad, strict=True))
    position, rows = inputs.position, inputs.rows
    query, do, out = _time_first(inputs.query), _time_first(grad_out), _time_first(out)  # (B, T, H, D)
    table, span_mask = _position_table(inputs), _span_mask(inputs)
    shared = _shared_args(inputs)
    dq, delta = torch.empty_like(query), torch.empty_like(lse)
    dk, dv = torch.empty_like(shared["k_ptr"]), torch.empty_like(shared["v_ptr"])
    dspan = lse.new_empty(inputs.key.shape[:2]) if needed["span"] else None  # (N, H)
    dbias = lse.new_empty(inputs.key.shape[:2]) if needed["bias"] else None  # (N, H)
    dposition = None
    if position is not None and needed["position"]:
        dposition = lse.new_zeros((len(position) if rows is None else len(rows), position.shape[1]))

    for chunk in _sample_chunks(query, table):
        args = _chunk_args(chunk, query, inputs.offsets, span_mask, table)
        args |= {"do_ptr": do[chunk], "lse_ptr": lse[chunk], "delta_ptr": delta[chunk]}
        drel = None if table is None else torch.zeros_like(args["rel_ptr"])
        outputs: dict[str, Any] = {"out_ptr": out[chunk], "dq_ptr": dq[chunk], "drel_ptr": drel}
        _launch(kernels.backward_dq_kernel, BACKWARD_DQ, **args, **shared, **outputs)  # stores delta too
        if needed["key"] or needed["value"] or needed["span"] or needed["bias"]:
            outputs = {"dk_ptr": dk, "dv_ptr": dv, "dspan_ptr": dspan, "dbias_ptr": dbias}
            _launch(kernels.backward_dkv_kernel, BACKWARD_DKV, **args, **shared, **outputs)
        if table is not None and drel is not None:
            drel = drel.flatten(0, 2)  # (B' T H, P)
            dq[chunk].flatten(0, 2).add_(_matmul(drel, table))
            if dposition is not None:
                dposition += _matmul(drel.T, query[chunk].flatten(0, 2))
    if position is not None and rows is not None and dposition is not None:  # deterministic, unlike index_add
        lengths = torch.searchsorted(rows, torch.arange(len(position) + 1, device=rows.device)).diff()
        dposition = torch.segment_reduce(dposition, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)

    def reduce_like(tensor: Tensor | None, grad: Tensor | None) -> Tensor | None:
        return None if tensor is None or grad is None else grad.sum_to_size(tensor.shape).to(tensor.dtype)

    dspan, dposition = reduce_like(inputs.span, dspan), reduce_like(position, dposition)
    grads = (dq.transpose(1, 2), dk, dv, dspan, dposition, reduce_like(inputs.bias, dbias))
    return [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]


def _time_first(tensor: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, H, D), the layout in which a linear layer leaves it: usually without a copy."""
    return tensor.transpose(1, 2).contiguous()


def _position_table(inputs: AttentionInputs) -> Tensor | None:
    """Return the position table with a row for every distance, (P, D)."""
    if inputs.position is None or len(inputs.position) == 0:
        return None
    table = inputs.position if inputs.rows is None else inputs.position[inputs.rows]
    return table.to(inputs.query.dtype)


def _shared_args(inputs: AttentionInputs) -> dict[str, Any]:
    """Return the kernel arguments that are the same for all samples."""
    key, value = inputs.key.contiguous(), inputs.value.contiguous()
    return {"k_ptr": key, "v_ptr": value, "dropout": float(inputs.dropout), "seed": inputs.seed}


def _sample_chunks(query: Tensor, table: Tensor | None) -> Iterator[slice]:
    """Split the samples into those whose rel is in memory at the same time."""
    samples, block, heads, _ = query.shape
    elements = 1 if table is None else max(1, block * heads * len(table))  # of one sample's rel
    if elements >= 2**31:
        sizes = f"{block} queries x {heads} heads x {elements // block // heads} positions"
        raise ValueError(f"the position scores of one sample must have fewer than 2^31 elements, got {sizes}")
    chunk = max(1, samples if table is None else MAX_REL_ELEMENTS // elements)
    return (slice(first, min(first + chunk, samples)) for first in range(0, samples, chunk))


def _chunk_args(
    chunk: slice, query: Tensor, offsets: Tensor, span_mask: SpanMask, table: Tensor | None
) -> dict[str, Any]:
    """Return the kernel arguments of some samples. The keys stay whole, as the offsets point into them."""
    max_age = None if span_mask.max_age is None else span_mask.max_age[chunk]
    return {
        "q_ptr": query[chunk],
        "offsets_ptr": offsets[:, chunk.start : chunk.stop + 1].contiguous(),
        "span_mask": span_mask._replace(max_age=max_age),
        "rel_ptr": None if table is None else _matmul(query[chunk], table.T),  # (B', T, H, P)
    }


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply without autocast, which may be on in forward and off in backward."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _span_mask(inputs: AttentionInputs) -> SpanMask:
    heads, min_distance = inputs.query.shape[1], inputs.min_distance
    age = inputs.age.clamp(-MAX_DISTANCE, MAX_DISTANCE)
    first_query = (1 if min_distance is None else min_distance.clamp(-MAX_DISTANCE, MAX_DISTANCE)) - age
    end_query = (inputs.span - age[:, None] + inputs.ramp).clamp(max=MAX_DISTANCE)  # (N, H or 1)
    max_age = None
    if inputs.reach is not None:
        max_age = inputs.reach - torch.arange(inputs.reach.shape[1], device=age.device)
        max_age = max_age.clamp(-MAX_DISTANCE, MAX_DISTANCE).int().contiguous()

    def head_first(rows: Tensor) -> Tensor:  # (N or 1, H or 1) -> (H, N), so that a tile's keys are contiguous
        return rows.float().expand(len(age), heads).T.contiguous()

    bias = None if inputs.bias is None else head_first(inputs.bias * math.log2(math.e))
    return SpanMask(age.int(), first_query.int(), head_first(end_query), max_age, bias, float(inputs.ramp))


def _launch(
    kernel: Any,
    configs: dict[tuple[int, int], TileConfig],
    q_ptr: Tensor,
    k_ptr: Tensor,
    rel_ptr: Tensor | None,
    offsets_ptr: Tensor,
    **args: Any,
) -> None:
    samples, block, heads, head_dim = q_ptr.shape
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    suitable = [key for key in configs if key[0] == q_ptr.element_size() and block_d <= key[1]]
    if not suitable:
        raise ValueError(
            f"backend='triton' takes heads of up to 256 elements of 2 or 4 bytes, got {head_dim} of {q_ptr.dtype}"
        )
    block_m, block_n, num_warps, num_stages = configs[min(suitable)]
    if kernel is kernels.backward_dkv_kernel:
        args |= _key_tiles(offsets_ptr, len(k_ptr), block_n)
        grid = (len(args["tile_start_ptr"]), heads, 1)
    else:
        args |= {"offsets_ptr": offsets_ptr, "NUM_PARTS": len(offsets_ptr)}
        grid = (-(-block // block_m), heads, samples)
    if 0 in grid:
        return
    num_positions = 0 if rel_ptr is None else rel_ptr.shape[3]
    args |= {"N": len(k_ptr), "T": block, "P": num_positions, "scale": head_dim**-0.5}
    args |= {"H": heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n}
    args |= {"USE_DROPOUT": args["dropout"] > 0, "num_warps": num_warps, "num_stages": num_stages}
    with torch.cuda.device_of(q_ptr):
        kernel[grid](q_ptr=q_ptr, k_ptr=k_ptr, rel_ptr=rel_ptr, **args)


def _key_tiles(offsets: Tensor, total: int, block_n: int) -> dict[str, Tensor]:
    """Return the sample of each tile of keys, its first row, and the row where its part ends, (tiles,) each.

    They are computed on the device, so that the host need not wait for it. The host only knows an upper bound of the
    number of tiles: the last few may begin beyond the end of the last part, where they are empty. The last tile of a
    part may be partly empty.
    """
    tiles = ((offsets.diff() + block_n - 1) // block_n).flatten()  # (parts B,)
    ends = tiles.cumsum(0)
    tile = torch.arange(-(-total // block_n) + len(tiles), device=offsets.device)
    segment = torch.searchsorted(ends, tile, right=True).clamp(max=len(tiles) - 1)  # which part of which sample
    start = offsets[:, :-1].flatten()[segment] + (tile - ends[segment] + tiles[segment]) * block_n
    return {
        "tile_sample_ptr": segment % (offsets.shape[1] - 1),
        "tile_start_ptr": start,
        "tile_end_ptr": offsets[:, 1:].flatten()[segment],
    }
