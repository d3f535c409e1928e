"""span_attention against nested loops, packed against padded."""

import pytest
import torch
from loop import attention_by_loops
from tolerance import assert_equal

from expire_span import packed_span_attention, span_attention


def drawn(seed, samples=2, heads=3, queries=5, size=4, kept=(4, 9), positions=6, reach=True, dtype=torch.double):
    """Random inputs for a padded call: sample b has kept[b] live memories, the rest are padding out of every span."""
    g = torch.Generator().manual_seed(seed)
    most = max(kept)
    age = torch.stack([torch.randperm(24, generator=g)[:most] + 1 for _ in range(samples)])
    age = torch.cat([age, -torch.arange(queries).expand(samples, -1)], 1)  # (B, S): memories, then the block
    keys = age.shape[1]
    live = torch.cat([torch.arange(most) < torch.tensor(kept)[:, None], torch.ones(samples, queries).bool()], 1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    inputs = {
        "query": normal(samples, heads, queries, size),
        "key": normal(samples, heads, keys, size),
        "value": normal(samples, heads, keys, size),
        "span": (torch.rand(samples, heads, keys, generator=g, dtype=dtype) * 30 - 3).requires_grad_(),
        "bias": normal(samples, heads, keys),
        "position": normal(positions, size),
    }
    fixed = {
        "age": torch.where(live, age, 2**40),
        "ramp": 5.0,
        "born": torch.randint(1, 5, (samples, keys), generator=g),
        "reach": torch.randint(0, 25, (samples, queries), generator=g) if reach else None,
    }
    return inputs, fixed, live


def gradients(out, inputs):
    weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return dict(zip(inputs, torch.autograd.grad((out * weight).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize("positions", [0, 1, 6, 40])
@pytest.mark.parametrize("kept", [(0, 3), (4, 9), (1, 0)], ids=str)
def test_attention_equals_nested_loops_with_all_gradients(kept, positions):
    inputs, fixed, _ = drawn(positions + 100 * kept[0], kept=kept, positions=positions)
    ours, loops = span_attention(**inputs, **fixed), attention_by_loops(**inputs, **fixed)
    assert_equal("out", ours, loops)
    if positions == 0:
        del inputs["position"]
    reference = gradients(loops, inputs)
    for name, gradient in gradients(ours, inputs).items():
        assert_equal(f"gradient of {name}", gradient, reference[name])


@pytest.mark.parametrize("kept", [(0, 3), (4, 9), (17, 1)], ids=str)
def test_packed_attention_equals_the_padded_definition_with_all_gradients(kept):
    inputs, fixed, live = drawn(7, kept=kept)
    padded = span_attention(**inputs, **fixed)
    rows = {name: inputs[name].transpose(1, 2)[live] for name in ("key", "value", "span", "bias")}  # (N, H, ...)
    packed = packed_span_attention(
        inputs["query"],
        rows["key"],
        rows["value"],
        torch.cat([torch.zeros(1, dtype=torch.long), live.sum(1).cumsum(0)]),
        span=rows["span"],
        bias=rows["bias"],
        position=inputs["position"],
        **fixed | {"age": fixed["age"][live], "born": fixed["born"][live]},
    )
    assert_equal("out", packed, padded)
    reference = gradients(padded, inputs)
    for name, gradient in gradients(packed, inputs).items():
        assert_equal(f"gradient of {name}", gradient, reference[name])


def test_a_query_that_sees_nothing_gets_zero_and_no_gradient():
    inputs, fixed, _ = drawn(3)
    out = span_attention(**inputs, **fixed | {"reach": torch.zeros(2, 5, dtype=torch.long)})
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(out, inputs).values())


def test_a_memory_with_m_0_changes_nothing_however_loud_it_is():
    inputs, fixed, _ = drawn(5, reach=False)
    expired = torch.zeros_like(inputs["span"]).bool()
    expired[:, :, 2] = True
    quiet = {**inputs, "span": inputs["span"].masked_fill(expired, -100.0)}
    loud = {
        **quiet,
        "bias": inputs["bias"].masked_fill(expired, 1e4),
        "value": inputs["value"].masked_fill(expired[..., None], 1e30),
    }
    assert torch.equal(span_attention(**quiet, **fixed), span_attention(**loud, **fixed))
    assert all(gradient.isfinite().all() for gradient in gradients(span_attention(**loud, **fixed), inputs).values())


def test_m_1_is_plain_softmax_attention():
    inputs, fixed, _ = drawn(1, positions=0, reach=False)
    inputs = {**inputs, "span": torch.full_like(inputs["span"], 1e6), "bias": None, "position": None}
    ours = span_attention(**inputs, **fixed | {"born": None, "ramp": 1.0})
    distance = fixed["age"][:, None] + torch.arange(5)[:, None]
    visible = (distance >= 1) & (distance < 2**39)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], attn_mask=visible[:, None]
    )
    some = visible.any(-1)[:, None, :, None]
    assert_equal("out", ours, theirs.where(some, torch.zeros(())))


def test_gradient_of_the_span_is_that_of_finite_differences_on_the_ramp():
    inputs, fixed, _ = drawn(11)

    def attend(*tensors):
        return span_attention(**dict(zip(inputs, tensors, strict=True)), **fixed)

    torch.autograd.gradcheck(attend, tuple(inputs.values()))
