"""torch's own attentions, as the benchmark uses them, compute what ours computes wherever they can express it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from assertions import assert_equal

from expire_span import packed_span_attention
from expire_span.memory.packed import concatenate_parts, from_dense, keep_rows

SCRIPTS = Path(__file__).parents[2] / "scripts"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def bench_attention():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("bench_attention")
    sys.path.remove(str(SCRIPTS))


def random_inputs(kept, shared_span, dtype=torch.float64, heads=2, queries=6, head_dim=16, positions=7):
    """Samples with so many memories each, and their block; spans that end within the block."""
    g = torch.Generator().manual_seed(0)
    age = torch.cat([torch.cat([torch.randperm(40, generator=g)[:n] + 1, -torch.arange(queries)]) for n in kept])
    total, samples = len(age), len(kept)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).to(DEVICE).requires_grad_()

    span = torch.rand(total, 1 if shared_span else heads, generator=g, dtype=dtype) * 30 - 6
    differentiable = {
        "query": normal(samples, heads, queries, head_dim),
        "key": normal(total, heads, head_dim),
        "value": normal(total, heads, head_dim),
        "span": span.to(DEVICE).requires_grad_(),
        "position": normal(positions, head_dim),
        "bias": normal(total, heads),
    }
    others = {
        "offsets": torch.tensor([0, *kept]).cumsum(0) + torch.arange(samples + 1) * queries,
        "age": age,
        "reach": torch.randint(0, 25, (samples, queries), generator=g),
        "min_distance": torch.randint(1, 5, (total,), generator=g),
    }
    return differentiable, {name: tensor.to(DEVICE) for name, tensor in others.items()} | {"ramp": 5.0}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shared_span", [True, False])
def test_flex_attention_with_a_captured_mask_positions_and_bias_is_our_attention(
    bench_attention, shared_span, monkeypatch
):
    """With gradients: on a CPU torch refuses them, although what it runs there, uncompiled, has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None, raising=False)
    dtype = torch.float32 if DEVICE == "cuda" else torch.float64
    differentiable, others = random_inputs((4, 9, 0), shared_span, dtype)
    results = []
    for attention in (bench_attention.flex, lambda **inputs: packed_span_attention(**inputs, backend="reference")):
        out = attention(**differentiable, **others)
        upstream = torch.sin(torch.arange(out.numel(), dtype=dtype, device=DEVICE)).view_as(out)
        results.append([out, *torch.autograd.grad((out * upstream).sum(), list(differentiable.values()))])
    for name, ours, expected in zip(["out", *differentiable], *results, strict=True):
        assert_equal(name, ours, expected, 1e-10 if DEVICE == "cpu" else 1e-3)


def flash_attention(query, key, value, query_bounds, key_bounds, max_q, max_k, *, window_size):
    """What varlen_attn documents, on a CPU: causal from the lower right, within a window of rows on the left."""
    assert max_q == int(query_bounds.diff().max())
    assert max_k == int(key_bounds.diff().max())
    outputs = []
    for bounds in zip(query_bounds.unfold(0, 2, 1).tolist(), key_bounds.unfold(0, 2, 1).tolist(), strict=True):
        queries, (keys, values) = query[slice(*bounds[0])], (rows[slice(*bounds[1])] for rows in (key, value))
        last = torch.arange(len(queries))[:, None] + len(keys) - len(queries)  # the last row that each query sees
        row = torch.arange(len(keys))
        visible = (row <= last) & (row >= last - window_size[0])
        scores = torch.einsum("thd,shd->hts", queries, keys) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num()  # 0 where nothing is visible
        outputs.append(torch.einsum("hts,shd->thd", weights, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("kept", ["all", "some"])
def test_varlen_attention_sees_the_pairs_of_hard_spans(bench_attention, monkeypatch, kept):
    """Transformer-XL's; and those of memories of which some are gone, if none expires within the block."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float64
    if DEVICE == "cpu":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_attention)
    samples, span, block, heads, head_dim = 3, 12, 8, 2, 16
    hidden = torch.randn(samples, span + block, heads * head_dim)
    memory = from_dense(hidden[:, :span], torch.arange(-span, 0))
    if kept == "some":
        memory = keep_rows(memory, torch.arange(len(memory.time)) % 5 < torch.tensor([2, 3, 0]).repeat_interleave(span))
    attended = concatenate_parts(memory, from_dense(hidden[:, span:], torch.arange(block)))
    g = torch.Generator().manual_seed(0)
    tensors = {
        "query": torch.randn(samples, heads, block, head_dim, generator=g, dtype=torch.float64),
        "key": torch.randn(len(attended.time), heads, head_dim, generator=g, dtype=torch.float64),
        "value": torch.randn(len(attended.time), heads, head_dim, generator=g, dtype=torch.float64),
    }
    tensors = {name: tensor.to(DEVICE, dtype) for name, tensor in tensors.items()}
    mask = {
        "offsets": attended.offsets,
        "age": -attended.time,
        "span": torch.full((1, 1), float(span) if kept == "all" else 100.0),
    }
    mask = {name: tensor.to(DEVICE) for name, tensor in mask.items()} | {"ramp": 1.0}
    expected = packed_span_attention(**tensors, **mask, backend="reference")
    assert_equal("out", bench_attention.varlen(**tensors, **mask), expected)
