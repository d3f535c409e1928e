"""The fused attention gives the same bits twice: no gradient is summed in an order that changes."""

import os

import pytest
import torch

from expire_span import packed_span_attention

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
# streams, heads, queries, memories, size of a head, positions
SIZES = {"cuda": (8, 8, 512, 2000, 64, 512), "cpu": (3, 2, 32, 100, 16, 32)}


def ragged_inputs(dtype, spans_by_head):
    """Each sample has from a half of the memories to all of them; spans end within the block, too."""
    samples, heads, queries, memories, head_dim, positions = SIZES[DEVICE]
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(memories // 2, memories, (samples,), generator=g).tolist()
    age = [torch.randperm(2 * memories, generator=g)[:length] + 1 for length in lengths]
    age = torch.cat([torch.cat([part.sort(descending=True).values, -torch.arange(queries)]) for part in age])
    total = len(age)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype).requires_grad_()

    span = torch.rand(total, heads if spans_by_head else 1, generator=g) * 2 * memories
    inputs = {
        "query": normal(samples, heads, queries, head_dim),
        "key": normal(total, heads, head_dim),
        "value": normal(total, heads, head_dim),
        "span": span.to(DEVICE).requires_grad_(),
        "position": normal(positions, head_dim),
        "bias": torch.randn(total, heads, generator=g).to(DEVICE).requires_grad_(),
    }
    offsets = torch.tensor([0, *(length + queries for length in lengths)]).cumsum(0)
    return inputs, {"age": age.to(DEVICE), "offsets": offsets.to(DEVICE), "ramp": 64.0}


@pytest.mark.parametrize("spans_by_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32])
def test_output_and_gradients_of_span_bias_and_all_others_are_the_same_bits_twice(dtype, spans_by_head):
    inputs, others = ragged_inputs(dtype, spans_by_head)
    results = []
    for _ in range(2):
        out = packed_span_attention(**inputs, **others)
        upstream = torch.sin(torch.arange(out.numel(), device=DEVICE)).to(dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, list(inputs.values()), upstream)])
    for name, one, other in zip(["out", *inputs], *results, strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name
