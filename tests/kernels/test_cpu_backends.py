"""The backends for a CPU against the reference: values, gradients, what they save, and what happens without C++."""

import re
from pathlib import Path

import pytest
import torch
from assertions import assert_equal
from torch._subclasses.fake_tensor import FakeTensorMode

from expire_span import packed_span_attention
from expire_span.kernels import cpp_backend, padded


@pytest.fixture(params=["cpp", "torch"])
def backend(request):
    if request.param == "cpp" and not cpp_backend.available():
        pytest.skip("no C++ compiler")
    return request.param


@pytest.fixture
def cpp():
    if not cpp_backend.available():
        pytest.skip("no C++ compiler")


def random_inputs(
    kept, heads=3, queries=6, head_dim=4, positions=7, shared=False, reach=False, bias=True, min_distance=True, seed=0
):
    """Return differentiable and other arguments. Sample b has kept[b] memories, some expired, and then its block.

    shared: whether all heads share span and bias.
    """
    g = torch.Generator().manual_seed(seed)
    age = torch.cat([torch.cat([torch.randperm(40, generator=g)[:n] + 1, -torch.arange(queries)]) for n in kept])
    total, samples = len(age), len(kept)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double).requires_grad_()

    span = torch.rand(total, 1 if shared else heads, generator=g, dtype=torch.double) * 30 - 6
    inputs = {
        "query": normal(samples, heads, queries, head_dim),
        "key": normal(total, heads, head_dim),
        "value": normal(total, heads, head_dim),
        "span": span.requires_grad_(),
    }
    if bias:
        inputs["bias"] = normal(total, 1 if shared else heads)
    if positions:
        inputs["position"] = normal(positions, head_dim)
    offsets = torch.tensor([0, *kept]).cumsum(0) + torch.arange(samples + 1) * queries
    constants = {"age": age, "ramp": 5.0, "offsets": offsets}
    if min_distance:
        constants["min_distance"] = torch.randint(1, 5, (total,), generator=g)
    if reach:
        constants["reach"] = torch.randint(0, 25, (samples, queries), generator=g)
    return inputs, constants


def with_gradients(inputs, constants, **options):
    out = packed_span_attention(**inputs, **constants, **options)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.double)).to(out.dtype).view_as(out)
    return out, torch.autograd.grad((out * upstream).sum(), list(inputs.values()))


def assert_equals_reference(inputs, constants, backend):
    """The output and all gradients are those of the reference, in double precision."""
    out, ours = with_gradients(inputs, constants, backend=backend)
    reference, theirs = with_gradients(inputs, constants, backend="reference")
    assert_equal("out", out, reference)
    for name, grad, expected in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", grad, expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"kept": (4, 9, 0)},
        {"kept": (12,), "shared": True},
        {"kept": (5, 5), "reach": True},
        {"kept": (0, 0), "queries": 1},
        {"kept": (7, 30, 2), "queries": 1, "positions": 50},
        {"kept": (3, 8), "positions": 0, "bias": False, "min_distance": False},
        {"kept": (25, 6), "positions": 100, "shared": True, "reach": True},
    ],
    ids=str,
)
def test_every_backend_equals_the_reference_with_all_gradients(sizes, backend):
    assert_equals_reference(*random_inputs(**sizes), backend)


def test_chunks_of_one_sample_give_the_same(monkeypatch):
    monkeypatch.setattr(padded, "CHUNK_SCORES", 1)
    assert_equals_reference(*random_inputs((4, 9, 0), reach=True), "torch")


@pytest.mark.parametrize("order", ["consecutive ages", "shuffled ages"])
def test_more_keys_than_a_tile_holds_give_the_same(order, backend):
    inputs, constants = random_inputs((0,), heads=1, queries=1500, head_dim=3, positions=90)
    if order == "shuffled ages":
        constants["age"] = constants["age"][torch.randperm(1500, generator=torch.Generator().manual_seed(1))]
    assert_equals_reference(inputs, constants, backend)


@pytest.mark.parametrize("head_dim", [1, 5, 16, 20, 32, 72])
def test_heads_of_any_size_give_the_same(head_dim, backend):
    inputs, constants = random_inputs((0, 38), heads=2, queries=41, head_dim=head_dim, positions=70, reach=True)
    assert_equals_reference(inputs, constants, backend)


@pytest.mark.parametrize("ages", ["consecutive", "consecutive, then scattered", "scattered, then consecutive"])
def test_consecutive_and_scattered_ages_have_the_same_position_scores(ages, backend):
    inputs, constants = random_inputs((0,), queries=300, positions=200)  # 64 or more consecutive ages are one tile
    scattered = -torch.arange(150).flip(0) * 2 + 3 * 150
    if ages == "consecutive, then scattered":
        constants["age"][150:] = scattered
    elif ages == "scattered, then consecutive":
        constants["age"][:150] = scattered
    assert_equals_reference(inputs, constants, backend)


@pytest.mark.parametrize("ages", ["consecutive", "every third"])
@pytest.mark.parametrize("positions", [11, 40], ids=["table ends before the farthest key", "table ends after it"])
def test_distances_may_share_rows_of_the_position_table(ages, positions, backend):
    inputs, constants = random_inputs((30, 4), positions=positions, queries=9)
    if ages == "every third":
        constants["age"] = constants["age"] * 3
    rows = torch.cat([torch.arange(5), 5 + torch.arange(positions - 5).repeat_interleave(4)])
    out, ours = with_gradients(inputs, constants, rows=rows, backend=backend)
    expanded = inputs | {"position": inputs["position"][rows]}
    reference, theirs = with_gradients(expanded, constants, backend="reference")
    dposition = torch.zeros_like(inputs["position"]).index_add(0, rows, theirs[list(inputs).index("position")])
    assert_equal("out", out, reference)
    for name, grad, expected in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", grad, dposition if name == "position" else expected)


@pytest.mark.parametrize("name", ["cpp", "torch", "reference"])
def test_rows_of_a_sample_may_be_in_several_parts(name):
    """All memories and then all blocks, as in a layer, give the same as sample by sample, with all gradients."""
    if name == "cpp" and not cpp_backend.available():
        pytest.skip("no C++ compiler")
    kept, queries = (4, 9, 0), 6
    inputs, constants = random_inputs(kept, reach=True, queries=queries)
    in_memory = torch.cat([torch.arange(n + queries) < n for n in kept])
    order = torch.cat([in_memory.nonzero(), (~in_memory).nonzero()]).squeeze(1)
    reordered = {name: inputs[name].detach()[order].requires_grad_() for name in ("key", "value", "span", "bias")}
    parts = torch.stack([torch.tensor([0, 4, 13, 13]), 13 + queries * torch.arange(4)])
    in_parts = {"offsets": parts, "age": constants["age"][order], "min_distance": constants["min_distance"][order]}

    out, ours = with_gradients(inputs | reordered, constants | in_parts, backend=name)
    reference, theirs = with_gradients(inputs, constants, backend="reference")
    assert_equal("out", out, reference)
    for name, grad, expected in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", grad, expected[order] if name in reordered else expected)


def test_two_threads_give_what_one_gives(backend):
    inputs, constants = random_inputs((40, 12, 3), queries=200, head_dim=32, positions=90)  # enough work for two
    one_out, one_grads = with_gradients(inputs, constants, backend=backend)
    torch.set_num_threads(2)
    try:
        two_out, two_grads = with_gradients(inputs, constants, backend=backend)
    finally:
        torch.set_num_threads(1)
    assert_equal("out", two_out, one_out)
    for name, one, two in zip(inputs, one_grads, two_grads, strict=True):
        assert_equal(f"gradient of {name}", two, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_are_as_close_as_their_rounding_allows(dtype, backend):
    inputs, constants = random_inputs((40, 12), queries=30, head_dim=16)
    narrow = {name: tensor.detach().to(torch.float32 if name == "span" else dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in narrow.items()}
    narrow = {name: tensor.requires_grad_() for name, tensor in narrow.items()}
    out, ours = with_gradients(narrow, constants, backend=backend)
    reference, theirs = with_gradients(wide, constants, backend="reference")
    assert out.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    assert_equal("out", out.double(), reference, tolerance)
    for name, grad, expected in zip(inputs, ours, theirs, strict=True):
        assert grad.dtype == narrow[name].dtype
        scale = max(1.0, float(expected.abs().max()))
        assert_equal(f"gradient of {name}", grad.double(), expected, tolerance * scale)


def test_tiny_and_huge_scores_neither_vanish_nor_overflow(backend):
    inputs, constants = random_inputs((12, 5), positions=0)
    for factor in (1e-3, 300.0):
        scaled = {name: tensor.detach().float() for name, tensor in inputs.items()}
        scaled["query"] = scaled["query"] * factor
        exact = {name: tensor.double() for name, tensor in scaled.items()}
        out = packed_span_attention(**scaled, **constants, backend=backend)
        assert_equal("out", out.double(), packed_span_attention(**exact, **constants, backend="reference"), 2e-4)


@pytest.mark.parametrize("rows", [[0], list(range(18))], ids=["one key", "all keys"])
def test_nan_in_a_visible_key_reaches_the_output(rows, backend):
    inputs, constants = random_inputs((12,), positions=0, min_distance=False)
    inputs["key"].data[rows] = torch.nan
    inputs["span"].data.fill_(50)
    assert packed_span_attention(**inputs, **constants, backend=backend).isnan().any()


@pytest.mark.parametrize("span", [torch.tensor(12.0), torch.tensor([[3.0, 9.0, 20.0]])], ids=["one", "one a head"])
def test_all_keys_may_share_a_span(span, backend):
    inputs, constants = random_inputs((4, 9))
    inputs["span"] = span.double().requires_grad_()
    assert_equals_reference(inputs, constants, backend)


def test_nothing_as_large_as_the_scores_is_saved_for_backward(backend):
    inputs, constants = random_inputs((40, 30), queries=40, positions=30)
    scores = 2 * 3 * 40 * 70  # B H T S, at least
    largest = {"reference": 0, backend: 0}
    for name in largest:

        def record(tensor, name=name):
            largest[name] = max(largest[name], tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            packed_span_attention(**inputs, **constants, backend=name)
    assert largest["reference"] >= scores
    assert largest[backend] <= max(tensor.numel() for tensor in inputs.values())


def test_backward_drops_the_same_weights_as_forward(backend):
    inputs, constants = random_inputs((4, 9), queries=3, positions=3)

    def attend(*tensors):
        torch.manual_seed(5)
        arguments = dict(zip(inputs, tensors, strict=True))
        return packed_span_attention(**arguments, **constants, dropout=0.4, backend=backend)

    assert torch.autograd.gradcheck(attend, tuple(inputs.values()))


def test_dropout_keeps_the_mean(backend):
    inputs, constants = random_inputs((40,), positions=0)
    with torch.no_grad():
        undropped = packed_span_attention(**inputs, **constants, backend=backend)
        dropped = [packed_span_attention(**inputs, **constants, dropout=0.3, backend=backend) for _ in range(3000)]
    assert_equal("mean", sum(dropped) / 3000, undropped, 0.1)


def test_an_unknown_backend_and_an_unavailable_one_are_refused(monkeypatch):
    inputs, constants = random_inputs((4,))
    with pytest.raises(ValueError, match="backend must be one of auto, cpp, triton, torch, reference, got 'fast'"):
        packed_span_attention(**inputs, **constants, backend="fast")
    monkeypatch.setattr(cpp_backend, "available", lambda: False)
    with pytest.raises(ValueError, match="backend='cpp' is for the CPU and needs a C\\+\\+ compiler"):
        packed_span_attention(**inputs, **constants, backend="cpp")


@pytest.mark.parametrize(
    ("invalid", "message"),
    [
        ({"offsets": torch.tensor([0, 10, 99])}, "offsets must run from 0 to the number of keys, 25"),
        ({"offsets": torch.tensor([0, 30, 25])}, "offsets must not decrease"),
        ({"offsets": torch.tensor([[0, 5, 9], [10, 12, 25]])}, "offsets must run from .*, 25, part by part"),
        ({"offsets": torch.tensor([0, 25])}, r"offsets must be \(parts, 3\)"),
        ({"rows": torch.tensor([0, 2])}, "rows must index the 7 rows of position"),
        ({"rows": torch.tensor([5, 6, 7])}, "rows must index the 7 rows of position"),
        ({"age": torch.zeros(7, dtype=torch.long)}, "age and min_distance must be"),
        ({"reach": torch.zeros(1, 6, dtype=torch.long)}, "reach must be"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("cpp")
def test_inputs_that_would_be_read_out_of_bounds_are_refused(invalid, message):
    inputs, constants = random_inputs((4, 9))
    with pytest.raises(RuntimeError, match=message):
        packed_span_attention(**inputs, **constants | invalid, backend="cpp")


def test_a_position_table_may_have_any_strides(backend):
    inputs, constants = random_inputs((4, 9), positions=6)
    inputs["position"] = torch.randn(4, 6, dtype=torch.double).T.requires_grad_()
    assert_equals_reference(inputs, constants, backend)


def test_a_block_without_queries_gives_an_empty_output(backend):
    inputs, constants = random_inputs((4, 9))
    inputs["query"] = inputs["query"].detach()[:, :, :0]
    assert packed_span_attention(**inputs, **constants, backend=backend).shape == (2, 3, 0, 4)


def test_every_included_header_is_among_the_sources_that_trigger_recompilation():
    folder = Path(cpp_backend.__file__).parent
    included = {name for path in cpp_backend.SOURCES for name in re.findall(r'#include "(.+)"', path.read_text())}
    assert included == {path.name for path in cpp_backend.SOURCES[1:]}
    assert all((folder / name).exists() for name in included)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.usefixtures("cpp")
def test_fake_gradients_have_the_shapes_and_strides_of_the_real_ones(shared):
    inputs, constants = random_inputs((4, 9), shared=shared)
    query, key, value, span, bias, position = (tensor.detach() for tensor in inputs.values())
    offsets, age, min_distance = constants["offsets"][None], constants["age"], constants["min_distance"]
    position = position.T.contiguous().T
    args = [query, key, value, offsets, age, span, position, None, None, bias, min_distance, 5.0, 0.0, 0, "cpp"]
    out, lse = torch.ops.expire_span.attention(*args)
    args = [out, out, lse, *args, [True] * 6]
    real = torch.ops.expire_span.attention_backward(*args)
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in args]
        fake = torch.ops.expire_span.attention_backward(*args)
    assert [(grad.shape, grad.stride()) for grad in fake] == [(grad.shape, grad.stride()) for grad in real]


def test_more_queries_than_a_tile_holds_give_the_same_also_across_episodes(backend):
    inputs, constants = random_inputs((40, 5), heads=2, queries=600, head_dim=4, positions=300)
    time = torch.arange(600)
    constants["reach"] = torch.stack([time + 20, time % 250])  # the second sample's episodes begin within tiles
    assert_equals_reference(inputs, constants, backend)


def test_more_queries_than_a_tile_holds_drop_the_same_weights_in_backward(backend):
    """The output is linear in the values, so that values times their gradients give it back."""
    inputs, constants = random_inputs((40, 5), heads=2, queries=600, positions=0)
    torch.manual_seed(5)
    out, grads = with_gradients(inputs, constants, dropout=0.4, backend=backend)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.double)).view_as(out)
    assert_equal("sum", (grads[2] * inputs["value"]).sum(), (out * upstream).sum())


@pytest.mark.parametrize("queries", [6, 600])
def test_keys_that_no_query_sees_have_gradients_of_0(queries, backend):
    inputs, constants = random_inputs((40, 5), queries=queries)
    inputs["span"].data[: 40 + queries] = -10  # the first sample sees nothing
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with NaN
    try:
        assert_equals_reference(inputs, constants, backend)
    finally:
        torch.use_deterministic_algorithms(False)
