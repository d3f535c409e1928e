"""Packed attention of random inputs: every backend on a CPU against nested loops, and its gradients."""

import math

import pytest
import torch
from assertions import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import naive_attention

from expire_span import packed_span_attention
from expire_span.kernels import cpp_backend


@st.composite
def attention_inputs(draw):
    """Differentiable and other arguments of packed attention, in double precision, of up to 3 samples in 1 or 2 parts.

    The spans are negative, zero, whole, fractional or infinite; a sample may have no keys at all.
    """
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples, heads, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    queries, parts = draw(st.integers(1, 6)), draw(st.integers(1, 2))
    lengths = torch.tensor([draw(st.integers(0, 7)) for _ in range(parts * samples)])
    ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    offsets = torch.stack([ends[part * samples : (part + 1) * samples + 1] for part in range(parts)])
    total = int(ends[-1])

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double).requires_grad_()

    span = torch.rand(total if draw(st.booleans()) else 1, heads if draw(st.booleans()) else 1, generator=g) * 20 - 4
    kind = torch.randint(5, span.shape, generator=g)
    span = span.double().where(kind > 2, span.double().round())  # whole spans are where masks begin and end
    span = span.where(kind != 0, draw(st.sampled_from([-3.0, 0.0, math.inf])))
    inputs = {"query": normal(samples, heads, queries, head_dim), "key": normal(total, heads, head_dim)}
    inputs |= {"value": normal(total, heads, head_dim), "span": span.requires_grad_()}
    if draw(st.booleans()):
        inputs["bias"] = normal(total, heads)
    num_positions = draw(st.integers(0, 12))
    if num_positions:
        inputs["position"] = normal(num_positions, head_dim)
    constants = {"offsets": offsets, "ramp": draw(st.sampled_from([0.5, 1.0, 3.0, 7.5]))}
    constants["age"] = torch.randint(-queries, 18, (total,), generator=g)
    if draw(st.booleans()):
        constants["min_distance"] = torch.randint(1, 5, (total,), generator=g)
    if draw(st.booleans()):
        constants["reach"] = torch.randint(0, 15, (samples, queries), generator=g)
    if num_positions and draw(st.booleans()):
        constants["rows"] = torch.arange(num_positions).repeat_interleave(draw(st.integers(1, 3)))
    return inputs, constants


def by_loops(inputs, constants):
    """The output of each sample by nested loops."""
    heads, total = inputs["query"].shape[1], len(inputs["key"])
    position, out = inputs.get("position"), []
    if "rows" in constants:
        position = position[constants["rows"]]
    for sample in range(len(inputs["query"])):
        ranges = constants["offsets"][:, sample : sample + 2].tolist()
        rows = torch.cat([torch.arange(start, end) for start, end in ranges])
        per_head = {
            name: inputs[name].expand(total, heads)[rows].T[None] for name in ("span", "bias") if name in inputs
        }
        key, value = (inputs[name][rows].transpose(0, 1)[None] for name in ("key", "value"))
        each = {name: constants[name][None, rows] for name in ("age", "min_distance") if name in constants}
        reach = constants["reach"][sample : sample + 1] if "reach" in constants else None
        query = inputs["query"][sample : sample + 1]
        others = {"ramp": constants["ramp"], "position": position, "reach": reach}
        out.append(naive_attention(query, key, value, **per_head, **each, **others))
    return torch.cat(out)


def gradients(out, inputs):
    upstream = torch.sin(torch.arange(out.numel())).to(out.dtype).view_as(out)
    if not out.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad((out * upstream).sum(), list(inputs.values()), allow_unused=True)


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@settings(deadline=None, derandomize=True, max_examples=60)
@given(attention_inputs())
def test_attention_of_random_inputs_is_that_of_nested_loops_with_all_gradients(backend, arguments):
    if backend == "cpp" and not cpp_backend.available():
        pytest.skip("no C++ compiler")
    inputs, constants = arguments
    expected = by_loops(inputs, constants)
    expected_grads = gradients(expected, inputs)
    for dtype, tolerance in ((torch.double, 1e-9), (torch.float32, 2e-4)):
        converted = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        out = packed_span_attention(**converted, **constants, backend=backend)
        assert_equal("out", out.double(), expected, tolerance)
        for name, ours, theirs in zip(inputs, gradients(out, converted), expected_grads, strict=True):
            zeros = torch.zeros_like(inputs[name])
            ours, theirs = (zeros if grad is None else grad.double() for grad in (ours, theirs))
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            assert_equal(f"gradient of {name}", ours, theirs, tolerance * scale)
