"""The Triton backend against the reference: compiled on a GPU, interpreted elsewhere."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from assertions import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

from expire_span import ExpireSpan, Transformer, TransformerConfig, span_attention
from expire_span.kernels.inputs import DIFFERENTIABLE, AttentionInputs

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # triton's

from expire_span.kernels import triton_backend  # noqa: E402


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if INTERPRETED:
        from triton_interpreter import multiply_bfloat16, use_small_tiles

        use_small_tiles(monkeypatch)
        multiply_bfloat16(monkeypatch)


def random_inputs(
    lengths=(30, 0, 11),
    queries=18,
    heads=2,
    head_dim=16,
    positions=12,
    span_shape="NH",
    bias_shape="NH",
    ordered=False,
    reach=True,
    min_distance=True,
    dtype=torch.float32,
):
    """Return AttentionInputs. Sample b has lengths[b] keys: the block's own, as many as fit, and older ones.

    span_shape, bias_shape: which of the dimensions (N, H) are not 1; ordered: whether the oldest keys come first.
    """
    g = torch.Generator().manual_seed(0)
    total, samples = sum(lengths), len(lengths)

    def random_ages(length):
        in_block = min(queries, length)
        older = torch.randperm(3 * (length - in_block), generator=g)[: length - in_block].sort(descending=True).values
        ages = torch.cat([older + 1, -torch.arange(in_block)])
        return ages if ordered else ages[torch.randperm(length, generator=g)]

    def shape(dimensions):
        return total if "N" in dimensions else 1, heads if "H" in dimensions else 1

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    inputs = AttentionInputs(
        query=normal(samples, queries, heads, head_dim).transpose(1, 2).to(dtype),
        key=normal(total, heads, head_dim).to(dtype),
        value=normal(total, heads, head_dim).to(dtype),
        offsets=torch.tensor([(0, *lengths)]).cumsum(1),
        age=torch.cat([random_ages(length) for length in lengths]),
        span=torch.rand(shape(span_shape), generator=g) * 40 - 10,
        ramp=7.0,
        position=normal(positions, head_dim).to(dtype) if positions else None,
        rows=None,
        reach=torch.randint(0, 40, (samples, queries), generator=g) if reach else None,
        bias=normal(*shape(bias_shape)) if bias_shape else None,
        min_distance=torch.randint(1, 6, (total,), generator=g) if min_distance else None,
        dropout=0.0,
        seed=3,
    )
    return AttentionInputs(*(value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in inputs))


def reference_results(inputs, kept_weights=None):
    """Return output and gradients of the reference in float64, sample by sample.

    kept_weights: which attention weights dropout keeps, (1, H, T, S) for each sample.
    """
    names = [name for name in DIFFERENTIABLE if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).double().requires_grad_() for name in names}
    position = leaves.get("position")
    if inputs.rows is not None:
        position = position[inputs.rows]
    query, key, value, span = (leaves[name] for name in ("query", "key", "value", "span"))
    heads, total, out = query.shape[1], len(key), []

    def by_head(rows, sample_rows):  # (N or 1, H or 1) -> (1, H, S)
        return rows.expand(total, heads)[sample_rows].T[None]

    for b, (start, end) in enumerate(pairwise(inputs.offsets[0].tolist())):
        if start == end:
            out.append(0 * query[b : b + 1])
            continue
        rows = slice(start, end)
        arguments = {
            "age": inputs.age[None, rows],
            "span": by_head(span, rows),
            "ramp": inputs.ramp,
            "position": position,
            "reach": None if inputs.reach is None else inputs.reach[b : b + 1],
            "bias": by_head(leaves["bias"], rows) if "bias" in leaves else None,
            "min_distance": None if inputs.min_distance is None else inputs.min_distance[None, rows],
        }
        keys, values = (packed[rows].transpose(0, 1)[None] for packed in (key, value))  # (1, H, S, D)
        if kept_weights is None:
            out.append(span_attention(query[b : b + 1], keys, values, **arguments))
        else:
            one_hot = torch.eye(end - start, dtype=torch.double, device=DEVICE).expand(1, heads, -1, -1)
            weight = span_attention(query[b : b + 1], keys, one_hot, **arguments)  # (1, H, T, S)
            out.append(weight * kept_weights[b] / (1 - inputs.dropout) @ values)
    out = torch.cat(out)
    loss = (out * upstream(out)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return out, dict(zip(names, grads, strict=True))


def upstream(out):
    """The gradient of the output in these tests."""
    return torch.sin(torch.arange(out.numel(), device=out.device, dtype=torch.double)).view(out.shape).to(out.dtype)


def triton_results(inputs):
    out, lse = triton_backend.forward(inputs)
    needs_grad = [getattr(inputs, name) is not None for name in DIFFERENTIABLE]
    grads = triton_backend.backward(upstream(out), out, lse, inputs, needs_grad)
    return out, {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if grad is not None}


def assert_equals_reference(inputs, kept_weights=None, tolerance=1e-5):
    (out, grads), (reference, expected) = triton_results(inputs), reference_results(inputs, kept_weights)
    assert grads.keys() == expected.keys()
    pairs = {"out": (out, reference)} | {f"gradient of {name}": (grads[name], expected[name]) for name in expected}
    for name, (ours, theirs) in pairs.items():
        scale = max([1.0, *theirs.abs().flatten().tolist()])  # larger for sums over many queries
        assert_equal(name, ours, theirs, tolerance * scale)
    assert out.dtype == inputs.query.dtype
    assert all(grads[name].dtype == getattr(inputs, name).dtype for name in grads)


def assert_same_bits(results, expected):
    (out, grads), (expected_out, expected_grads) = results, expected
    assert torch.equal(out, expected_out)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in DIFFERENTIABLE)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"span_shape": "N", "bias_shape": "N"},
        {"span_shape": "H", "bias_shape": "H"},
        {"span_shape": "", "bias_shape": ""},
        {"ordered": True, "bias_shape": None, "reach": False, "min_distance": False},
        {"positions": 0},
        {"positions": 1},
        {"positions": 200, "reach": False},
        {"head_dim": 24, "heads": 1},
        {"head_dim": 64, "heads": 1},
        {"head_dim": 128, "heads": 1},
        {"queries": 1, "lengths": (17, 1)},
        {"queries": 5, "lengths": (16, 33, 2)},
        {"queries": 70, "lengths": (85,), "heads": 1},
        {"lengths": (0, 0)},
    ],
    ids=str,
)
def test_values_and_all_gradients_are_those_of_the_reference(sizes):
    assert_equals_reference(random_inputs(**sizes))


def test_rows_of_a_sample_may_be_in_several_parts():
    inputs = random_inputs(lengths=(17, 40, 3), heads=2, positions=30, span_shape="N", bias_shape="N")
    first, total = torch.tensor([9, 25, 0]), 60  # how many rows of each sample are in the first of two parts
    lengths = inputs.offsets[0].diff().cpu()
    in_first = torch.cat([torch.arange(length) < n for length, n in zip(lengths, first, strict=True)])
    order = torch.cat([in_first.nonzero(), (~in_first).nonzero()]).squeeze(1).to(DEVICE)
    ends = [torch.cat([rows.new_zeros(1), rows.cumsum(0)]) for rows in (first, lengths - first)]
    names = ("key", "value", "age", "span", "bias", "min_distance")
    in_parts = inputs._replace(
        offsets=torch.stack([ends[0], ends[1] + first.sum()]).to(DEVICE),
        **{name: getattr(inputs, name)[order] for name in names},
    )
    (out, grads), (reference, expected) = triton_results(in_parts), reference_results(inputs)
    assert_equal("out", out, reference, 1e-5)
    for name, grad in grads.items():
        theirs = expected[name][order] if len(expected[name]) == total else expected[name]
        assert_equal(f"gradient of {name}", grad, theirs, 1e-5 * max(1.0, float(theirs.abs().max())))


def test_distances_may_share_rows_of_the_position_table():
    inputs = random_inputs(lengths=(30, 11), heads=1, positions=12, reach=False)
    rows = torch.tensor([0, 1, 2, *sorted([3, 4, 5, 6, 7, 8, 9] * 3)], device=DEVICE)
    assert_equals_reference(inputs._replace(rows=rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype):
    assert_equals_reference(random_inputs(heads=1, dtype=dtype), tolerance=2e-2)


def test_the_last_row_of_the_position_table_counts_where_only_it_is_reached():
    inputs = random_inputs(lengths=(3,), queries=1, heads=1, positions=7, reach=False, min_distance=False)
    ages = torch.tensor([9, 8, 7], device=DEVICE)
    assert_equals_reference(inputs._replace(age=ages, span=inputs.span.abs() + 9))


def test_integer_spans_with_a_hard_edge_and_pooled_memories_that_become_visible_late():
    max_span, rate, queries = 8, 2, 20
    unpooled = torch.arange(max_span, -queries, -1)  # ages
    pooled = torch.arange(5 * rate + 1, -queries + max_span, -rate)
    is_pooled = torch.cat([torch.zeros_like(unpooled), torch.ones_like(pooled)])
    sizes = {"lengths": (len(is_pooled),), "queries": queries, "positions": max_span + 6 * rate}
    inputs = random_inputs(**sizes, bias_shape=None, reach=False)._replace(
        age=torch.cat([unpooled, pooled]).to(DEVICE),
        span=(max_span + is_pooled * 6.0 * rate)[:, None].to(DEVICE),
        min_distance=torch.where(is_pooled == 1, max_span + 1, 1).to(DEVICE),
        ramp=1,
    )
    assert len(set(inputs.age.tolist())) < len(is_pooled)
    assert_equals_reference(inputs)


def test_position_scores_of_some_samples_at_a_time_give_the_same(monkeypatch):
    inputs = random_inputs(lengths=(9, 0, 20, 5, 3), queries=5, heads=1, positions=12)
    monkeypatch.setattr(triton_backend, "MAX_REL_ELEMENTS", 2 * 5 * 12)  # of two samples
    assert_equals_reference(inputs)


def test_tiles_in_which_every_memory_has_expired_are_skipped():
    inputs = random_inputs(lengths=(540, 20), queries=18, heads=1, ordered=True, min_distance=False)
    expired = torch.arange(560, device=DEVICE) < 512  # whole tiles
    span, reach = torch.where(expired[:, None], -1e6, 1e6), torch.full_like(inputs.reach, 10**6)
    inputs = inputs._replace(span=span, reach=reach)
    nans = {name: getattr(inputs, name).masked_fill(expired[:, None, None], torch.nan) for name in ("key", "value")}
    assert_same_bits(triton_results(inputs._replace(**nans)), triton_results(inputs))


def test_a_query_that_sees_no_key_gets_zero_and_no_gradient():
    inputs = random_inputs(queries=5)
    inputs = inputs._replace(reach=torch.zeros_like(inputs.reach))
    out, lse = triton_backend.forward(inputs)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in triton_results(inputs)[1].values())


def test_a_memory_with_m_0_changes_nothing_however_high_its_score():
    inputs = random_inputs(lengths=(30,), heads=1, reach=False)
    expired = torch.arange(30, device=DEVICE) % 7 == 2
    inputs = inputs._replace(span=inputs.span.masked_fill(expired[:, None], -100.0))
    high = inputs._replace(bias=inputs.bias.masked_fill(expired[:, None], 1e4))
    assert_same_bits(triton_results(high), triton_results(inputs))


def kept_by_dropout(inputs):
    """Return which weights dropout keeps, by attending to one-hot values, and their share."""
    one_hot = torch.zeros_like(inputs.value)  # (N, H, D)
    for start, end in pairwise(inputs.offsets[0].tolist()):
        one_hot[start:end] = torch.eye(end - start, one_hot.shape[2], device=DEVICE)[:, None]
    dropped, _ = triton_backend.forward(inputs._replace(value=one_hot))
    undropped, _ = triton_backend.forward(inputs._replace(value=one_hot, dropout=0.0))
    kept = [dropped[b : b + 1, :, :, :n] != 0 for b, n in enumerate(inputs.offsets[0].diff().tolist())]
    return kept, (dropped != 0).sum() / (undropped != 0).sum()


def test_backward_drops_the_same_weights_as_forward():
    inputs = random_inputs(lengths=(32, 27), head_dim=32)._replace(dropout=0.3)
    kept, share = kept_by_dropout(inputs)
    assert 0.65 < share < 0.75
    assert_equals_reference(inputs, kept)


def test_dropout_differs_between_seeds_and_repeats_for_the_same_seed():
    inputs = random_inputs(lengths=(12,), queries=5, heads=1)._replace(dropout=0.3)
    first, again, other = (triton_backend.forward(inputs._replace(seed=seed))[0] for seed in (5, 5, 2**40))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_autocast_changes_nothing():
    inputs = random_inputs(queries=3, lengths=(9,), heads=1)
    expected = triton_results(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same_bits(triton_results(inputs), expected)


def test_two_calls_give_the_same_bits():
    inputs = random_inputs(heads=1)._replace(dropout=0.2)
    assert_same_bits(triton_results(inputs), triton_results(inputs))


@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_only_the_needed_gradients_are_returned(needed):
    inputs = random_inputs(queries=3, lengths=(9,), heads=1)
    out, lse = triton_backend.forward(inputs)
    needs_grad = [name == needed for name in DIFFERENTIABLE]
    grads = triton_backend.backward(upstream(out), out, lse, inputs, needs_grad)
    assert [grad is not None for grad in grads] == needs_grad
    assert torch.equal(grads[DIFFERENTIABLE.index(needed)], triton_results(inputs)[1][needed])


def test_the_host_never_waits_for_the_device():
    class NoSynchronization(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function), "the host reads a number from the device"
            assert "nonzero" not in str(function), "the host waits for a size"
            return function(*args, **kwargs or {})

    inputs = random_inputs(queries=5, lengths=(20, 3))
    with NoSynchronization():
        triton_results(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_for_a_gpu_even_without_one(capability, tmp_path):
    script = Path(__file__).parents[1] / "support/compile_triton.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, script, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "compiled\n", done.stderr


def test_reach_may_have_any_strides():
    inputs = random_inputs()
    strided = inputs._replace(reach=inputs.reach.T.contiguous().T)
    assert not strided.reach.is_contiguous()
    assert torch.equal(triton_backend.forward(inputs)[0], triton_backend.forward(strided)[0])


def test_heads_that_are_too_large_or_of_float64_are_refused():
    with pytest.raises(
        ValueError, match=r"takes heads of up to 256 elements of 2 or 4 bytes, got 512 of torch.float32"
    ):
        triton_backend.forward(random_inputs(head_dim=512))
    with pytest.raises(ValueError, match=r"got 16 of torch.float64"):
        triton_backend.forward(random_inputs(dtype=torch.float64))


def test_without_triton_the_backend_is_not_available(monkeypatch):
    assert triton_backend.available()
    monkeypatch.setattr(triton_backend, "kernels", None)
    assert not triton_backend.available()


def test_a_model_computes_the_same_with_triton_as_with_the_reference():
    """In training and over several blocks, through `packed_span_attention`."""
    torch.manual_seed(0)
    config = TransformerConfig(11, 32, num_heads=2, feedforward_size=32, attention_backend="triton")
    mechanisms = [ExpireSpan(32, 40, 4.0, 0.1, num_positions=8, init_span_ratio=0.4) for _ in range(2)]
    model = Transformer(config, mechanisms).to(DEVICE)
    for mechanism in model.mechanisms:
        torch.nn.init.normal_(mechanism.weight)
    tokens = torch.randint(11, (2, 5 * 8), device=DEVICE)
    results = {}
    for backend in ("triton", "reference"):
        for layer in model.layers:
            layer.attention.backend = backend
        state, outputs = model.initial_state(2), []
        model.zero_grad()
        for block in tokens.split(8, 1):
            logits, state, metrics = model(block, state)
            (logits.square().mean() + metrics["span_loss"]).backward()
            outputs.append(logits.detach())
        results[backend] = [torch.cat(outputs, 1), *(parameter.grad.clone() for parameter in model.parameters())]
    names = ["logits", *(f"gradient of {name}" for name, _ in model.named_parameters())]
    for name, ours, reference in zip(names, results["triton"], results["reference"], strict=True):
        assert_equal(name, ours, reference, 1e-4)
