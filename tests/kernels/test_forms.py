"""The forms for a CPU against the definition: values, gradients, what they keep, and where C++ is not to be had."""

import re
from pathlib import Path

import pytest
import torch
from tolerance import assert_equal
from torch._subclasses.fake_tensor import FakeTensorMode

from expire_span import attention, packed_span_attention
from expire_span.kernels import operator, packed_cpp


@pytest.fixture(params=["cpp", "torch"])
def kernel(request):
    if request.param == "cpp" and not packed_cpp.available():
        pytest.skip("no C++ compiler")
    return request.param


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
    weight = torch.sin(torch.arange(out.numel(), dtype=torch.double)).to(out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), list(inputs.values()))


def assert_same(inputs, fixed, kernel):
    """The form gives what the definition does, in double precision, with all gradients."""
    out, ours = with_gradients(inputs, fixed, kernel=kernel)
    reference, theirs = with_gradients(inputs, fixed, kernel="definition")
    assert_equal("out", out, reference)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, other)


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
def test_every_form_equals_the_definition_with_all_gradients(call, kernel):
    assert_same(*drawn(**call), kernel)


def test_parts_of_one_sample_give_the_same(monkeypatch):
    monkeypatch.setattr(attention, "PART", 1)
    assert_same(*drawn((4, 9, 0), reach=True), "torch")


@pytest.mark.parametrize("order", ["each one nearer than the last", "in any order"])
def test_many_memories_are_worked_on_in_tiles_and_give_the_same(order, kernel):
    inputs, fixed = drawn((0,), heads=1, queries=1500, size=3, positions=90)  # more scores than a tile has
    if order == "in any order":
        fixed["age"] = fixed["age"][torch.randperm(1500, generator=torch.Generator().manual_seed(1))]
    assert_same(inputs, fixed, kernel)


@pytest.mark.parametrize("size", [1, 5, 16, 20, 32, 72])
def test_heads_of_any_size_are_multiplied_right(size, kernel):
    inputs, fixed = drawn((0, 38), heads=2, queries=41, size=size, positions=70, reach=True)
    assert_same(inputs, fixed, kernel)


@pytest.mark.parametrize("ages", ["dense", "dense, then scattered", "scattered, then dense"])
def test_dense_and_scattered_memories_have_the_same_positions(ages, kernel):
    inputs, fixed = drawn((0,), queries=300, positions=200)  # dense; a run of 64 or more is taken apart
    scattered = -torch.arange(150).flip(0) * 2 + 3 * 150
    if ages == "dense, then scattered":
        fixed["age"][150:] = scattered
    elif ages == "scattered, then dense":
        fixed["age"][:150] = scattered
    assert_same(inputs, fixed, kernel)


@pytest.mark.parametrize("ages", ["dense", "every third"])
@pytest.mark.parametrize("positions", [11, 40], ids=["the table ends before the farthest key", "after it"])
def test_distances_may_share_rows_of_the_table(ages, positions, kernel):
    inputs, fixed = drawn((30, 4), positions=positions, queries=9)
    if ages == "every third":
        fixed["age"] = fixed["age"] * 3
    rows = torch.cat([torch.arange(5), 5 + torch.arange(positions - 5).repeat_interleave(4)])
    out, ours = with_gradients(inputs, fixed, rows=rows, kernel=kernel)
    reference, theirs = with_gradients(inputs | {"position": inputs["position"][rows]}, fixed, kernel="definition")
    of_position = list(inputs).index("position")
    shared = torch.zeros_like(inputs["position"]).index_add(0, rows, theirs[of_position])
    assert_equal("out", out, reference)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, shared if name == "position" else other)


@pytest.mark.parametrize("form", ["cpp", "torch", "definition"])
def test_a_sample_may_have_its_rows_in_several_places(form):
    """Memories first, then blocks, as a layer has them; or sample by sample: the same, with all gradients."""
    if form == "cpp" and not packed_cpp.available():
        pytest.skip("no C++ compiler")
    kept, queries = (4, 9, 0), 6
    inputs, fixed = drawn(kept, reach=True, queries=queries)
    in_memory = torch.cat([torch.arange(n + queries) < n for n in kept])
    order = torch.cat([in_memory.nonzero(), (~in_memory).nonzero()]).squeeze(1)
    by_row = {name: inputs[name].detach()[order].requires_grad_() for name in ("key", "value", "span", "bias")}
    parts = torch.stack([torch.tensor([0, 4, 13, 13]), 13 + queries * torch.arange(4)])
    moved = fixed | {"offsets": parts, "age": fixed["age"][order], "born": fixed["born"][order]}

    out, ours = with_gradients(inputs | by_row, moved, kernel=form)
    reference, theirs = with_gradients(inputs, fixed, kernel="definition")
    assert_equal("out", out, reference)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert_equal(f"gradient of {name}", one, other[order] if name in by_row else other)


def test_two_threads_give_what_one_gives(kernel):
    inputs, fixed = drawn((40, 12, 3), queries=200, size=32, positions=90)  # enough work for two
    one, once = with_gradients(inputs, fixed, kernel=kernel)
    torch.set_num_threads(2)
    try:
        two, twice = with_gradients(inputs, fixed, kernel=kernel)
    finally:
        torch.set_num_threads(1)
    assert_equal("out", two, one)
    for name, first, second in zip(inputs, once, twice, strict=True):
        assert_equal(f"gradient of {name}", second, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision_are_as_near_as_their_numbers_allow(dtype, kernel):
    inputs, fixed = drawn((40, 12), queries=30, size=16)
    narrow = {name: tensor.detach().to(torch.float32 if name == "span" else dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double().requires_grad_() for name, tensor in narrow.items()}
    narrow = {name: tensor.requires_grad_() for name, tensor in narrow.items()}
    out, ours = with_gradients(narrow, fixed, kernel=kernel)
    reference, theirs = with_gradients(wide, fixed, kernel="definition")
    assert out.dtype == dtype
    bar = 2e-5 if dtype == torch.float32 else 0.1
    assert_equal("out", out.double(), reference, bar)
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert one.dtype == narrow[name].dtype
        assert_equal(f"gradient of {name}", one.double(), other, bar * max(1.0, float(other.abs().max())))


def test_scores_of_any_size_neither_overflow_nor_vanish(kernel):
    inputs, fixed = drawn((12, 5), positions=0)
    for factor in (1e-3, 300.0):
        scaled = {name: tensor.detach().float() for name, tensor in inputs.items()}
        scaled["query"] = scaled["query"] * factor
        out = packed_span_attention(**scaled, **fixed, kernel=kernel)
        exact = packed_span_attention(**{k: v.double() for k, v in scaled.items()}, **fixed, kernel="definition")
        assert_equal("out", out.double(), exact, 2e-4)


@pytest.mark.parametrize("rows", [[0], list(range(18))], ids=["one", "all"])
def test_a_key_that_is_not_a_number_is_not_hidden(rows, kernel):
    inputs, fixed = drawn((12,), positions=0, born=False)
    inputs["key"].data[rows] = torch.nan
    inputs["span"].data.fill_(50)
    assert packed_span_attention(**inputs, **fixed, kernel=kernel).isnan().any()


@pytest.mark.parametrize("span", [torch.tensor(12.0), torch.tensor([[3.0, 9.0, 20.0]])], ids=["one number", "per head"])
def test_spans_may_be_one_number_or_one_a_head(span, kernel):
    inputs, fixed = drawn((4, 9))
    inputs["span"] = span.double().requires_grad_()
    assert_same(inputs, fixed, kernel)


def test_nothing_as_large_as_the_scores_is_kept_for_the_backward_pass(kernel):
    inputs, fixed = drawn((40, 30), queries=40, positions=30)
    scores = 2 * 3 * 40 * 70  # B H T S, at least
    largest = {"definition": 0, kernel: 0}
    for form in largest:

        def keep(tensor, form=form):
            largest[form] = max(largest[form], tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            packed_span_attention(**inputs, **fixed, kernel=form)
    assert largest["definition"] >= scores
    assert largest[kernel] <= max(tensor.numel() for tensor in inputs.values())


def test_dropout_drops_the_same_weights_backward_as_forward(kernel):
    inputs, fixed = drawn((4, 9), queries=3, positions=3)

    def call(*tensors):
        torch.manual_seed(5)
        given = dict(zip(inputs, tensors, strict=True))
        return packed_span_attention(**given, **fixed, dropout=0.4, kernel=kernel)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_dropout_keeps_the_mean(kernel):
    inputs, fixed = drawn((40,), positions=0)
    with torch.no_grad():
        whole = packed_span_attention(**inputs, **fixed, kernel=kernel)
        mean = sum(packed_span_attention(**inputs, **fixed, dropout=0.3, kernel=kernel) for _ in range(3000)) / 3000
    assert_equal("mean", mean, whole, 0.1)


def test_an_unknown_kernel_and_a_missing_one_are_refused(monkeypatch):
    inputs, fixed = drawn((4,))
    with pytest.raises(ValueError, match="kernel must be one of auto, cpp, triton, torch, definition, got 'fast'"):
        packed_span_attention(**inputs, **fixed, kernel="fast")
    monkeypatch.setattr(packed_cpp, "available", lambda: False)
    with pytest.raises(ValueError, match="kernel='cpp' is for a CPU, and needs a C\\+\\+ compiler"):
        packed_span_attention(**inputs, **fixed, kernel="cpp")


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "false"])
def test_without_a_working_compiler_another_form_is_taken_and_that_is_said(compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packed_cpp, "available", packed_cpp.available.__wrapped__)
    assert operator.form("auto", "cpu", torch.float32) == "torch"
    assert "attention takes twice as long, as its C++ cannot be had" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"offsets": torch.tensor([0, 10, 99])}, "offsets must lead from 0 to the 25 keys"),
        ({"offsets": torch.tensor([0, 30, 25])}, "offsets must not fall"),
        ({"offsets": torch.tensor([[0, 5, 9], [10, 12, 25]])}, "offsets must lead from 0 to the 25 keys, part by part"),
        ({"offsets": torch.tensor([0, 25])}, r"offsets must be \(parts, 3\)"),
        ({"rows": torch.tensor([0, 2])}, "rows must be of position's 7"),
        ({"rows": torch.tensor([5, 6, 7])}, "rows must be of position's 7"),
        ({"age": torch.zeros(7, dtype=torch.long)}, "age and born must be"),
        ({"reach": torch.zeros(1, 6, dtype=torch.long)}, "reach must be"),
    ],
    ids=str,
)
def test_what_would_be_read_beyond_its_end_is_refused(wrong, says):
    if not packed_cpp.available():
        pytest.skip("no C++ compiler")
    inputs, fixed = drawn((4, 9))
    with pytest.raises(RuntimeError, match=says):
        packed_span_attention(**inputs, **fixed | wrong, kernel="cpp")


def test_a_table_of_positions_may_lie_in_any_order(kernel):
    inputs, fixed = drawn((4, 9), positions=6)
    inputs["position"] = torch.randn(4, 6, dtype=torch.double).T.requires_grad_()
    assert_same(inputs, fixed, kernel)


def test_a_block_without_queries_gives_none(kernel):
    inputs, fixed = drawn((4, 9))
    inputs["query"] = inputs["query"].detach()[:, :, :0]
    assert packed_span_attention(**inputs, **fixed, kernel=kernel).shape == (2, 3, 0, 4)


def test_every_source_decides_whether_it_is_compiled_anew():
    folder = Path(packed_cpp.__file__).parent
    included = {name for path in packed_cpp.SOURCES for name in re.findall(r'#include "(.+)"', path.read_text())}
    assert included == {path.name for path in packed_cpp.SOURCES[1:]}
    assert all((folder / name).exists() for name in included)


@pytest.mark.parametrize("shared", [True, False])
def test_compiled_gradients_lie_where_they_are_said_to(shared):
    if not packed_cpp.available():
        pytest.skip("no C++ compiler")
    inputs, fixed = drawn((4, 9), shared=shared)
    query, key, value, span, bias, position = (each.detach() for each in inputs.values())
    rest = [fixed["offsets"][None], fixed["age"], span, 5.0, position.T.contiguous().T, None, None, bias, fixed["born"]]
    given = [query, key, value, *rest, 0.0, 0, "cpp"]
    out, lse = torch.ops.expire_span.attention(*given)
    given = [out, out, lse, *given, [True] * 6]
    ours = torch.ops.expire_span.attention_backward(*given)
    with FakeTensorMode() as mode:
        said = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in given]
        theirs = torch.ops.expire_span.attention_backward(*said)
    assert [(each.shape, each.stride()) for each in ours] == [(each.shape, each.stride()) for each in theirs]
