"""The Triton kernels against the definition: on a GPU compiled, else in Triton's interpreter."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from tolerance import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

from expire_span import Compressive, ExpireSpan, Transformer, TransformerConfig, span_attention
from expire_span.memory.packed import dense, empty, join

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # triton's

from expire_span.kernels import packed_triton  # noqa: E402

LEARNED = ("query", "key", "value", "span", "position", "bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's are small, so that small inputs have several tiles; and it multiplies bf16."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    tiles = {(size, 256): packed_triton.Tile(16, 16, 4, 1) for size in (2, 4)}
    for name in ("FORWARD", "FORWARD_FEW", "BACKWARD_QUERIES", "BACKWARD_KEYS"):
        monkeypatch.setattr(packed_triton, name, tiles)

    def floats(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        whole = handle.data.astype(numpy.uint32) << 16  # triton 3.6 would multiply the bits as whole numbers
        return interpreter.TensorHandle(whole.view(numpy.float32), interpreter.tl.float32)

    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, floats(a), floats(b), *rest)
    )


def drawn(
    lengths=(30, 0, 11),
    steps=18,
    heads=2,
    size=16,
    positions=12,
    spans="NH",
    biases="NH",
    ordered=False,
    reach=True,
    born=True,
    dtype=torch.float32,
    seed=0,
):
    """What `forward` takes. Sample b has lengths[b] keys: the block's own, as many as fit, and older ones."""
    g = torch.Generator().manual_seed(seed)
    total, samples = sum(lengths), len(lengths)

    def ages(length):
        own = min(steps, length)
        older = torch.randperm(3 * (length - own), generator=g)[: length - own].sort(descending=True).values + 1
        found = torch.cat([older, -torch.arange(own)])
        return found if ordered else found[torch.randperm(length, generator=g)]

    def by(shape):  # which of (N, H) are given one each
        return total if "N" in shape else 1, heads if "H" in shape else 1

    normal = torch.randn
    inputs = {
        "query": normal(samples, steps, heads, size, generator=g).transpose(1, 2),
        "key": normal(total, heads, size, generator=g),
        "value": normal(total, heads, size, generator=g),
        "offsets": torch.tensor((0, *lengths)).cumsum(0),
        "age": torch.cat([ages(length) for length in lengths]),
        "span": torch.rand(by(spans), generator=g) * 40 - 10,
        "ramp": 7.0,
        "position": normal(positions, size, generator=g) if positions else None,
        "rows": None,
        "reach": torch.randint(0, 40, (samples, steps), generator=g) if reach else None,
        "bias": normal(by(biases), generator=g) if biases else None,
        "born": torch.randint(1, 6, (total,), generator=g) if born else None,
        "dropout": 0.0,
        "seed": 3,
    }
    for name in ("query", "key", "value", "position"):
        inputs[name] = None if inputs[name] is None else inputs[name].to(dtype)
    return {name: given.to(DEVICE) if isinstance(given, torch.Tensor) else given for name, given in inputs.items()}


def defined(inputs, kept=None):
    """The definition in float64, sample by sample, with all gradients of the sum of out times `weights`.

    kept: which attention weights dropout leaves, for each sample (1, H, T, S).
    """
    names = [name for name in LEARNED if inputs[name] is not None]
    leaves = {name: inputs[name].double().requires_grad_() for name in names}
    position = leaves.get("position")
    if inputs["rows"] is not None:
        position = position[inputs["rows"]]
    query, key, value, span = (leaves[name] for name in LEARNED[:4])
    heads, total, out = query.shape[1], len(key), []

    def by_head(rows, own):  # (N or 1, H or 1) -> (1, H, S)
        return rows.expand(total, heads)[own].T[None]

    for b, (start, end) in enumerate(pairwise(inputs["offsets"].tolist())):
        if start == end:
            out.append(0 * query[b : b + 1])
            continue
        own = slice(start, end)
        given = {
            "age": inputs["age"][None, own],
            "span": by_head(span, own),
            "ramp": inputs["ramp"],
            "position": position,
            "reach": None if inputs["reach"] is None else inputs["reach"][b : b + 1],
            "bias": by_head(leaves["bias"], own) if "bias" in leaves else None,
            "born": None if inputs["born"] is None else inputs["born"][None, own],
        }
        keys, values = (rows[own].transpose(0, 1)[None] for rows in (key, value))  # (1, H, S, D)
        if kept is None:
            out.append(span_attention(query[b : b + 1], keys, values, **given))
        else:
            one = torch.eye(end - start, dtype=torch.double, device=DEVICE).expand(1, heads, -1, -1)
            weight = span_attention(query[b : b + 1], keys, one, **given)  # (1, H, T, S)
            out.append(weight * kept[b] / (1 - inputs["dropout"]) @ values)
    whole = torch.cat(out)
    loss = (whole * weights(whole)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return whole, dict(zip(names, gradients, strict=True))


def weights(out):
    return torch.sin(torch.arange(out.numel(), device=out.device, dtype=torch.double)).view(out.shape).to(out.dtype)


def computed(inputs):
    out, lse = packed_triton.forward(**inputs)
    needs = tuple(inputs[name] is not None for name in LEARNED)
    gradients = packed_triton.backward(weights(out), out, lse, **inputs, needs=needs)
    return out, {name: gradient for name, gradient in zip(LEARNED, gradients, strict=True) if gradient is not None}


def assert_as_defined(inputs, kept=None, tolerance=1e-5):
    (out, gradients), (reference, expected) = computed(inputs), defined(inputs, kept)
    assert gradients.keys() == expected.keys()
    pairs = {"out": (out, reference)} | {name: (gradients[name], expected[name]) for name in expected}
    for name, (ours, theirs) in pairs.items():
        assert ours.dtype == inputs["query" if name == "out" else name].dtype
        scale = max([1.0, *theirs.abs().flatten().tolist()])  # of sums over many queries, say
        assert_equal(f"out, or gradient: {name}", ours, theirs, tolerance * scale)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"spans": "N", "biases": "N"},
        {"spans": "H", "biases": "H"},
        {"spans": "", "biases": ""},
        {"ordered": True, "biases": None, "reach": False, "born": False},
        {"positions": 0},
        {"positions": 1},
        {"positions": 200, "reach": False},
        {"size": 24, "heads": 1},
        {"size": 64, "heads": 1},
        {"size": 128, "heads": 1},
        {"steps": 1, "lengths": (17, 1)},
        {"steps": 5, "lengths": (16, 33, 2)},
        {"steps": 70, "lengths": (85,), "heads": 1},
        {"lengths": (0, 0)},
    ],
    ids=str,
)
def test_values_and_all_gradients_are_those_of_the_definition(case):
    assert_as_defined(drawn(**case))


def test_a_sample_may_have_its_rows_in_several_places():
    inputs = drawn(lengths=(17, 40, 3), heads=2, positions=30, spans="N", biases="N")
    first, total = torch.tensor([9, 25, 0]), 60  # how many of each sample's rows stand in the first of two parts
    lengths = inputs["offsets"].diff().cpu()
    leads = torch.cat([torch.arange(length) < n for length, n in zip(lengths, first, strict=True)])
    order = torch.cat([leads.nonzero(), (~leads).nonzero()]).squeeze(1).to(DEVICE)
    ends = [torch.cat([each.new_zeros(1), each.cumsum(0)]) for each in (first, lengths - first)]
    moved = {
        name: given[order] if name not in ("query", "offsets") and len(given) == total else given
        for name, given in inputs.items()
        if isinstance(given, torch.Tensor)
    }
    moved["offsets"] = torch.stack([ends[0], ends[1] + first.sum()]).to(DEVICE)
    (out, ours), (reference, theirs) = computed(inputs | moved), defined(inputs)
    assert_equal("out", out, reference, 1e-5)
    for name, gradient in ours.items():
        expected = theirs[name][order] if len(theirs[name]) == total else theirs[name]
        assert_equal(f"gradient: {name}", gradient, expected, 1e-5 * max(1.0, float(expected.abs().max())))


def test_distances_may_share_rows_of_the_table():
    inputs = drawn(lengths=(30, 11), heads=1, positions=12, reach=False)
    assert_as_defined(inputs | {"rows": torch.tensor([0, 1, 2, *sorted([3, 4, 5, 6, 7, 8, 9] * 3)], device=DEVICE)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_close(dtype):
    assert_as_defined(drawn(heads=1, dtype=dtype), tolerance=2e-2)


def test_the_last_row_of_the_table_counts_where_it_alone_is_reached():
    inputs = drawn(lengths=(3,), steps=1, heads=1, positions=7, reach=False, born=False)
    assert_as_defined(inputs | {"age": torch.tensor([9, 8, 7], device=DEVICE), "span": inputs["span"].abs() + 9})


def test_whole_spans_with_a_hard_edge_and_pooled_memories_that_are_born_late():
    far, rate, steps = 8, 2, 20
    unpooled, pooled = torch.arange(far, -steps, -1), torch.arange(5 * rate + 1, -steps + far, -rate)  # ages
    kind = torch.cat([torch.zeros_like(unpooled), torch.ones_like(pooled)])
    inputs = drawn(lengths=(len(kind),), steps=steps, positions=far + 6 * rate, biases=None, reach=False)
    inputs |= {
        "age": torch.cat([unpooled, pooled]).to(DEVICE),
        "span": (far + kind * 6.0 * rate)[:, None].to(DEVICE),
        "born": torch.where(kind == 1, far + 1, 1).to(DEVICE),
        "ramp": 1,
    }
    assert len(set(inputs["age"].tolist())) < len(kind)
    assert_as_defined(inputs)


def test_no_query_sees_two_of_compressives_memories_at_one_distance():
    model, block, now, memory = Compressive(max_span=7, compressed=5, rate=3), 4, 0, empty(2, 1, torch.zeros(1))
    for _ in range(12):
        time = now + torch.arange(block)
        memory = join(join(memory, model.pool(memory, time)), dense(torch.zeros(2, block, 1), time))
        now += block
        distance = (time[:, None] - memory.time)[:, : int(memory.offsets[1])]  # (T, S), the first sample's
        span, born = (rows[: int(memory.offsets[1])] for rows in (model.span(memory)[:, 0], memory.born))
        for query, seen in zip(distance, (distance >= born) & (distance < span + model.ramp), strict=True):
            assert len(set(query[seen].tolist())) == seen.sum()


def test_the_table_of_positions_is_applied_to_a_part_of_the_samples_at_a_time(monkeypatch):
    inputs = drawn(lengths=(9, 0, 20, 5, 3), steps=5, heads=1, positions=12)
    monkeypatch.setattr(packed_triton, "TRANSIENT", 2 * 5 * 12)  # two samples'
    assert_as_defined(inputs)


def test_tiles_in_which_every_memory_has_expired_are_skipped():
    inputs = drawn(lengths=(540, 20), steps=18, heads=1, ordered=True, born=False)
    expired = torch.arange(560, device=DEVICE) < 512  # whole tiles
    inputs["span"] = torch.where(expired[:, None], -1e6, 1e6)
    inputs["reach"] = torch.full_like(inputs["reach"], 10**6)
    expected = computed(inputs)
    lost = inputs | {name: inputs[name].masked_fill(expired[:, None, None], torch.nan) for name in ("key", "value")}
    ours = computed(lost)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(ours[1][name], expected[1][name]) for name in LEARNED)


def test_a_query_that_sees_nothing_gets_zero_and_no_gradient():
    inputs = drawn(steps=5)
    inputs["reach"] = torch.zeros_like(inputs["reach"])
    out, lse = packed_triton.forward(**inputs)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((gradient == 0).all() for gradient in computed(inputs)[1].values())


def test_a_memory_with_m_0_changes_nothing_however_loud_it_is():
    inputs = drawn(lengths=(30,), heads=1, reach=False)
    expired = torch.arange(30, device=DEVICE) % 7 == 2
    inputs["span"] = inputs["span"].masked_fill(expired[:, None], -100.0)
    loud = inputs | {"bias": inputs["bias"].masked_fill(expired[:, None], 1e4)}
    (out, gradients), (quiet, expected) = computed(loud), computed(inputs)
    assert torch.equal(out, quiet)
    assert all(torch.equal(gradients[name], expected[name]) for name in LEARNED)


def kept_weights(inputs):
    """Which weights dropout leaves, read from an attention to values of which each tells its own key apart."""
    told = torch.zeros_like(inputs["value"])  # (N, H, D)
    for start, end in pairwise(inputs["offsets"].tolist()):
        told[start:end] = torch.eye(end - start, told.shape[2], device=DEVICE)[:, None]
    out, _ = packed_triton.forward(**inputs | {"value": told})
    whole, _ = packed_triton.forward(**inputs | {"value": told, "dropout": 0.0})
    kept = [out[b : b + 1, :, :, :length] != 0 for b, length in enumerate(inputs["offsets"].diff().tolist())]
    return kept, (out != 0).sum() / (whole != 0).sum()


def test_dropout_leaves_the_same_weights_in_forward_and_backward():
    inputs = drawn(lengths=(32, 27), size=32) | {"dropout": 0.3}
    kept, share = kept_weights(inputs)
    assert 0.65 < share < 0.75
    assert_as_defined(inputs, kept)


def test_dropout_is_another_for_another_seed_and_none_for_the_same():
    inputs = drawn(lengths=(12,), steps=5, heads=1) | {"dropout": 0.3}
    first, again, other = (packed_triton.forward(**inputs | {"seed": seed})[0] for seed in (5, 5, 2**40))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_autocast_rounds_nothing():
    inputs = drawn(steps=3, lengths=(9,), heads=1)
    out, gradients = computed(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        same, others = computed(inputs)
    assert torch.equal(out, same)
    assert all(torch.equal(gradients[name], others[name]) for name in LEARNED)


def test_two_calls_give_the_same_bits():
    inputs = drawn(heads=1) | {"dropout": 0.2}
    (out, gradients), (again, same) = computed(inputs), computed(inputs)
    assert torch.equal(out, again)
    assert all(torch.equal(gradients[name], same[name]) for name in LEARNED)


@pytest.mark.parametrize("needed", LEARNED)
def test_only_the_gradients_that_are_needed_are_made(needed):
    inputs = drawn(steps=3, lengths=(9,), heads=1)
    out, lse = packed_triton.forward(**inputs)
    needs = tuple(name == needed for name in LEARNED)
    gradients = packed_triton.backward(weights(out), out, lse, **inputs, needs=needs)
    assert [gradient is not None for gradient in gradients] == list(needs)
    assert torch.equal(gradients[LEARNED.index(needed)], computed(inputs)[1][needed])


def test_the_host_never_waits_for_the_device():
    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(function), "a number of the device is read by the host"
            assert "nonzero" not in str(function), "the host waits for a size"
            return function(*args, **kwargs or {})

    inputs = drawn(steps=5, lengths=(20, 3))
    with NoWaiting():
        computed(inputs)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_they_compile_for_a_gpu_whether_there_is_one_or_not(capability, tmp_path):
    script = Path(__file__).parents[1] / "support/compile_triton.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, script, capability], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "compiled\n", done.stderr


def test_a_reach_may_lie_in_memory_as_it_likes():
    inputs = drawn()
    turned = inputs | {"reach": inputs["reach"].T.contiguous().T}
    assert not turned["reach"].is_contiguous()
    assert torch.equal(packed_triton.forward(**inputs)[0], packed_triton.forward(**turned)[0])


def test_heads_that_are_too_large_or_of_float64_are_refused():
    with pytest.raises(ValueError, match=r"takes heads of up to 256 in 2 or 4 bytes, got 512 in torch.float32"):
        packed_triton.forward(**drawn(size=512))
    with pytest.raises(ValueError, match=r"got 16 in torch.float64"):
        packed_triton.forward(**drawn(dtype=torch.float64))


def test_without_triton_they_are_not_available(monkeypatch):
    assert packed_triton.available()
    monkeypatch.setattr(packed_triton, "kernels", None)
    assert not packed_triton.available()


def test_a_model_computes_the_same_with_the_kernels_as_without():
    """The one door, end to end: a layer's attention by Triton, in training and in evaluation."""
    torch.manual_seed(0)
    config = TransformerConfig(vocabulary=11, hidden_size=32, heads=2, feedforward_size=32, kernel="triton")
    model = Transformer(config, [ExpireSpan(32, 40, 4.0, 0.1, positions=8, init=0.4) for _ in range(2)]).to(DEVICE)
    for mechanism in model.mechanisms:
        torch.nn.init.normal_(mechanism.weight)
    tokens = torch.randint(11, (2, 5 * 8), device=DEVICE)
    found = {}
    for kernel in ("triton", "definition"):
        for layer in model.layers:
            layer.attention.kernel = kernel
        state, outputs = model.initial_state(2), []
        model.zero_grad()
        for block in tokens.split(8, 1):
            out, state, figures = model(block, state)
            (out.square().mean() + figures["span_loss"]).backward()
            outputs.append(out.detach())
        found[kernel] = [torch.cat(outputs, 1), *(parameter.grad.clone() for parameter in model.parameters())]
    names = ["scores", *(name for name, _ in model.named_parameters())]
    for name, ours, reference in zip(names, found["triton"], found["definition"], strict=True):
        assert_equal(name, ours, reference, 1e-4)
