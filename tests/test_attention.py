"""span_attention against nested loops, and packed against padded attention."""

import pytest
import torch
from assertions import assert_equal
from naive_attention import naive_attention

from expire_span import packed_span_attention, span_attention


def random_inputs(seed, samples=2, heads=3, queries=5, head_dim=4, kept=(4, 9), positions=6, reach=True):
    """Return differentiable and other arguments of a padded call, and which keys are not padding, (B, S).

    Sample b has kept[b] memories and then its block; the padding is out of every span.
    """
    g = torch.Generator().manual_seed(seed)
    most = max(kept)
    age = torch.stack([torch.randperm(24, generator=g)[:most] + 1 for _ in range(samples)])
    age = torch.cat([age, -torch.arange(queries).expand(samples, -1)], 1)  # (B, S): memories, then the block
    keys = age.shape[1]
    is_key = torch.cat([torch.arange(most) < torch.tensor(kept)[:, None], torch.ones(samples, queries).bool()], 1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.double).requires_grad_()

    inputs = {
        "query": normal(samples, heads, queries, head_dim),
        "key": normal(samples, heads, keys, head_dim),
        "value": normal(samples, heads, keys, head_dim),
        "span": (torch.rand(samples, heads, keys, generator=g, dtype=torch.double) * 30 - 3).requires_grad_(),
        "bias": normal(samples, heads, keys),
        "position": normal(positions, head_dim),
    }
    constants = {
        "age": torch.where(is_key, age, 2**40),
        "ramp": 5.0,
        "min_distance": torch.randint(1, 5, (samples, keys), generator=g),
        "reach": torch.randint(0, 25, (samples, queries), generator=g) if reach else None,
    }
    return inputs, constants, is_key


def gradients(out, inputs):
    upstream = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    return dict(zip(inputs, torch.autograd.grad((out * upstream).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize("positions", [0, 1, 6, 40])
@pytest.mark.parametrize("kept", [(0, 3), (4, 9), (1, 0)], ids=str)
def test_attention_equals_nested_loops_with_all_gradients(kept, positions):
    inputs, constants, _ = random_inputs(positions + 100 * kept[0], kept=kept, positions=positions)
    ours, naive = span_attention(**inputs, **constants), naive_attention(**inputs, **constants)
    assert_equal("out", ours, naive)
    if positions == 0:
        del inputs["position"]
    expected = gradients(naive, inputs)
    for name, grad in gradients(ours, inputs).items():
        assert_equal(f"gradient of {name}", grad, expected[name])


@pytest.mark.parametrize("kept", [(0, 3), (4, 9), (17, 1)], ids=str)
def test_packed_attention_equals_padded_attention_with_all_gradients(kept):
    inputs, constants, is_key = random_inputs(7, kept=kept)
    padded = span_attention(**inputs, **constants)
    rows = {name: inputs[name].transpose(1, 2)[is_key] for name in ("key", "value", "span", "bias")}  # (N, H, ...)
    rows |= {name: constants[name][is_key] for name in ("age", "min_distance")}  # (N,)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), is_key.sum(1).cumsum(0)])
    packed = packed_span_attention(**inputs | constants | rows, offsets=offsets)
    assert_equal("out", packed, padded)
    expected = gradients(padded, inputs)
    for name, grad in gradients(packed, inputs).items():
        assert_equal(f"gradient of {name}", grad, expected[name])


def test_a_query_that_sees_no_key_gets_zero_and_no_gradient():
    inputs, constants, _ = random_inputs(3)
    out = span_attention(**inputs, **constants | {"reach": torch.zeros(2, 5, dtype=torch.long)})
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in gradients(out, inputs).values())


def test_a_memory_with_m_0_changes_nothing_however_high_its_score_or_large_its_value():
    inputs, constants, _ = random_inputs(5, reach=False)
    expired = torch.zeros_like(inputs["span"]).bool()
    expired[:, :, 2] = True
    usual = {**inputs, "span": inputs["span"].masked_fill(expired, -100.0)}
    extreme = {
        **usual,
        "bias": inputs["bias"].masked_fill(expired, 1e4),
        "value": inputs["value"].masked_fill(expired[..., None], 1e30),
    }
    out = span_attention(**extreme, **constants)
    assert torch.equal(span_attention(**usual, **constants), out)
    assert all(grad.isfinite().all() for grad in gradients(out, inputs).values())


def test_with_m_1_it_is_plain_softmax_attention():
    inputs, constants, _ = random_inputs(1, positions=0, reach=False)
    inputs = {**inputs, "span": torch.full_like(inputs["span"], 1e6), "bias": None, "position": None}
    ours = span_attention(**inputs, **constants | {"min_distance": None, "ramp": 1.0})
    distance = constants["age"][:, None] + torch.arange(5)[:, None]
    visible = (distance >= 1) & (distance < 2**39)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], attn_mask=visible[:, None]
    )
    sees_any = visible.any(-1)[:, None, :, None]
    assert_equal("out", ours, theirs.where(sees_any, torch.zeros(())))


def test_all_gradients_are_those_of_finite_differences_also_on_the_ramp():
    inputs, constants, _ = random_inputs(11)

    def attend(*tensors):
        return span_attention(**dict(zip(inputs, tensors, strict=True)), **constants)

    torch.autograd.gradcheck(attend, tuple(inputs.values()))
