"""The fused CPU form against the definition: values, gradients, and what it keeps."""

import pytest
import torch
from tolerance import assert_equal

from expire_span import packed_span_attention
from expire_span.kernels import packed_torch


def drawn(kept, heads=3, queries=6, size=4, positions=7, shared=False, reach=False, bias=True, born=True, seed=0):
    """A packed call whose sample b has kept[b] memories and then its block; some memories have expired."""
    g = torch.Generator().manual_seed(seed)
    age = torch.cat([torch.cat([torch.randperm(40, generator=g)[:n] + 1, -torch.arange(queries)]) for n in kept])
    total, samples = len(age), len(kept)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double).requires_grad_()

    span = torch.rand(total, 1 if shared else heads, generator=g, dtype=torch.double) * 30 - 6
    inputs = {
        "query": normal(samples, heads, queries, size),
        "key": normal(total, heads, size),
        "value": normal(total, heads, size),
        "span": span.requires_grad_(),
    }
    if bias:
        inputs["bias"] = normal(total, 1 if shared else heads)
    if positions:
        inputs["position"] = normal(positions, size)
    offsets = torch.tensor([0, *kept]).cumsum(0) + torch.arange(samples + 1) * queries
    fixed = {"age": age, "ramp": 5.0, "offsets": offsets}
    if born:
        fixed["born"] = torch.randint(1, 5, (total,), generator=g)
    if reach:
        fixed["reach"] = torch.randint(0, 25, (samples, queries), generator=g)
    return inputs, fixed


def with_gradients(inputs, fixed, **how):
    out = packed_span_attention(**inputs, **fixed, **how)
    weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), list(inputs.values()))


TILES = {"one sample a tile": (10**6, 1), "all samples in one": (10**6, 10**6), "a head a tile": (1, 1)}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize(
    "call",
    [
        {"kept": (4, 9, 0)},
        {"kept": (12,), "shared": True},
        {"kept": (5, 5), "reach": True},
        {"kept": (0, 0), "queries": 1},
        {"kept": (7, 30, 2), "queries": 1, "positions": 50},
        {"kept": (3, 8), "positions": 0, "bias": False, "born": False},
        {"kept": (25, 6), "positions": 100, "shared": True, "reach": True},
    ],
    ids=str,
)
def test_the_fused_form_equals_the_definition_with_all_gradients(call, tile, monkeypatch):
    monkeypatch.setattr(packed_torch, "TILE", tile[0])
    monkeypatch.setattr(packed_torch, "SAMPLE", tile[1])
    inputs, fixed = drawn(**call)
    out, ours = with_gradients(inputs, fixed, kernel="torch")
    reference, theirs = with_gradients(inputs, fixed, kernel="definition")
    assert_equal("out", out, reference)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, other)


def test_a_window_of_keys_of_every_distance_needs_no_index_and_gives_the_same():
    inputs, fixed = drawn((12, 12), positions=20)
    fixed["age"] = (12 - torch.arange(18)).repeat(2)
    out, ours = with_gradients(inputs, fixed, kernel="torch")
    reference, theirs = with_gradients(inputs, fixed, kernel="definition")
    assert_equal("out", out, reference)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, other)


@pytest.mark.parametrize("span", [torch.tensor(12.0), torch.tensor([[3.0, 9.0, 20.0]])], ids=["one number", "per head"])
def test_spans_may_be_one_number_or_one_a_head(span):
    inputs, fixed = drawn((4, 9))
    inputs["span"] = span.double().requires_grad_()
    _, ours = with_gradients(inputs, fixed, kernel="torch")
    _, theirs = with_gradients(inputs, fixed, kernel="definition")
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, other)


def test_nothing_as_large_as_the_scores_is_kept_for_the_backward_pass():
    inputs, fixed = drawn((40, 30), queries=40, positions=30)
    scores = 2 * 3 * 40 * 70  # B H T S, at least
    kept = {"definition": 0, "torch": 0}
    for kernel in kept:

        def keep(tensor, kernel=kernel):
            kept[kernel] = max(kept[kernel], tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed_span_attention(**inputs, **fixed, kernel=kernel)
    assert kept["definition"] >= scores
    assert kept["torch"] == max(tensor.numel() for tensor in inputs.values())


def test_dropout_drops_the_same_weights_backward_as_forward():
    inputs, fixed = drawn((4, 9), queries=3, positions=3)

    def call(*tensors):
        torch.manual_seed(5)
        given = dict(zip(inputs, tensors, strict=True))
        return packed_span_attention(**given, **fixed, dropout=0.4, kernel="torch")

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_dropout_keeps_the_mean():
    inputs, fixed = drawn((40,), positions=0)
    with torch.no_grad():
        whole = packed_span_attention(**inputs, **fixed, kernel="torch")
        mean = sum(packed_span_attention(**inputs, **fixed, dropout=0.3, kernel="torch") for _ in range(3000)) / 3000
    assert_equal("mean", mean, whole, 0.1)


def test_an_unknown_kernel_and_a_missing_one_are_refused():
    inputs, fixed = drawn((4,))
    with pytest.raises(ValueError, match="kernel must be auto, torch, triton or definition, got 'fast'"):
        packed_span_attention(**inputs, **fixed, kernel="fast")
