"""Values and gradients of the authors' released code, in float64."""

import pytest
import torch
from golden import golden, golden_model, nearest_first, packed, parameters, zero_state
from loop import packed_by_loops
from tolerance import assert_equal
from torch.nn.functional import cross_entropy, log_softmax

import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, TransXL
from expire_span.attention import fade
from expire_span.memory.mechanism import reached
from expire_span.memory.packed import dense, join
from expire_span.transformer import MemoryAttention


def attention_of(g):
    attention = MemoryAttention(12, g.heads).double()
    linears = ("query", "key", "value", "output")  # theirs are wq, wk, wv, wo
    attention.load_state_dict({f"{ours}.weight": getattr(g, f"w{ours[0]}") for ours in linears})
    return attention


def assert_gradients(g, attention, position, tolerance=1e-10, **leaves):
    for ours in ("query", "key", "value", "output"):
        assert_equal(ours, attention.get_submodule(ours).weight.grad, getattr(g, f"grad_w{ours[0]}"), tolerance)
    assert_equal("position", position.grad, nearest_first(g.grad_key_pe), tolerance)
    for name, leaf in leaves.items():
        assert_equal(name, leaf.grad, getattr(g, f"grad_{name}"), tolerance)


def expire_span_of(g, weight, bias, size):
    memory = ExpireSpan(size, g.max_span, g.ramp, g.alpha, positions=4).double()
    memory.load_state_dict({"weight": weight.flatten(), "bias": bias.squeeze()})
    return memory


def losses(memory, entries, span, block):
    """The span loss of each sample alone."""
    age, sample = -entries.time, entries.time.new_zeros(len(entries.time))
    nearest, farthest = reached(age, entries.born, sample, block, None)
    rows = [slice(*pair) for pair in entries.offsets.unfold(0, 2, 1).tolist()]
    return torch.stack([memory.loss(span[row], nearest[row], farthest[row], 1, block) for row in rows])


def test_spans_fade_and_span_loss():
    g = golden("span_plain")
    memory = expire_span_of(g, g.weight, g.bias, 6)
    hidden = g.hidden.requires_grad_()
    entries = packed(hidden, g.ages.long())
    span = memory.span(entries)
    e = span.view(2, -1)
    assert_equal("span", e, g.span)
    assert_equal("remaining", e - g.ages, g.remaining_at_first_query)
    mask = fade(g.ages[:, None] + torch.arange(g.block)[:, None], e[:, None], g.ramp)  # (B, M, S)
    assert_equal("mask", mask, g.mask)
    loss = losses(memory, entries, span, g.block)
    assert_equal("loss", loss, g.loss)
    ((mask * g.upstream).sum() + loss.sum()).backward()
    assert_equal("gradient of hidden", hidden.grad, g.grad_hidden)
    assert_equal("gradient of w", memory.weight.grad, g.grad_weight)
    assert_equal("gradient of b", memory.bias.grad, g.grad_bias.squeeze())


def attended(attention, block, entries, span, **fading):
    """The block's attention to all entries, its own states among them."""
    key, value = attention.project(entries.hidden)
    return attention(block, key, value, entries.offsets, span=span, born=entries.born, **fading)


@pytest.fixture(params=["ours", "with their epsilon"])
def tolerance(request, monkeypatch):
    """Their softmax over faded scores adds 1e-8 to its denominator: with that alone added, all agrees to 1e-10."""
    if request.param == "ours":
        return 1e-7
    monkeypatch.setattr(transformer, "packed_span_attention", packed_by_loops(epsilon=1e-8))
    return 1e-10


def test_expire_span_attention(tolerance):
    g = golden("attn_expire")
    attention, memory = attention_of(g), expire_span_of(g, g.span_weight, g.span_bias, 12)
    position = nearest_first(g.key_pe).requires_grad_()
    remembered, block = g.memory.requires_grad_(), g.block.requires_grad_()
    entries = packed(torch.cat([remembered, block], 1), g.ages.long())
    span = memory.span(entries)
    out = attended(attention, block, entries, span, age=-entries.time, ramp=g.ramp, position=position)
    assert_equal("out", out, g.out, tolerance)
    loss = losses(memory, entries, span, 4)
    assert_equal("loss", loss, g.loss)
    ((out * g.upstream).sum() + loss.sum()).backward()
    assert_equal("span_weight", memory.weight.grad, g.grad_span_weight[0], 5 * tolerance)
    assert_equal("span_bias", memory.bias.grad, g.grad_span_bias[0], 5 * tolerance)
    assert_gradients(g, attention, position, 5 * tolerance, memory=remembered, block=block)


def test_fixed_span_attention():
    g = golden("attn_fixed")
    attention, memory = attention_of(g), TransXL(g.max_span)
    position = nearest_first(g.key_pe).requires_grad_()
    remembered, block = g.memory.requires_grad_(), g.block.requires_grad_()
    entries = join(packed(remembered, torch.arange(16, 0, -1).expand(2, -1)), dense(block, torch.arange(4)))
    span, age = memory.span(entries), -entries.time
    out = attended(attention, block, entries, span, age=age, ramp=memory.ramp, position=position)
    assert_equal("out", out, g.out)
    (out * g.upstream).sum().backward()
    assert_gradients(g, attention, position, memory=remembered, block=block)


def test_compressive_attention_and_what_it_keeps():
    g = golden("attn_compressive")
    L, C, c = g.normal_memories, g.compressed_memories, g.rate
    attention, memory = attention_of(g), Compressive(L, C, c)
    remembered, compressed, block = (t.requires_grad_() for t in (g.memory, g.compressed, g.block))
    position = torch.cat([nearest_first(g.key_pe)]).requires_grad_()  # L rows, then C + 1 slots: nearest first, both
    pooled_age = L + 1 + c * torch.arange(C, 0, -1)  # each pooled one's oldest state, plus 1
    state = join(
        packed(compressed, pooled_age.expand(2, -1), born=L + 1),
        packed(remembered, torch.arange(L, 0, -1).expand(2, -1)),
    )
    entries = join(join(state, memory.pool(state, torch.arange(4))), dense(block, torch.arange(4)))
    span, age = memory.span(entries), -entries.time
    out = attended(attention, block, entries, span, age=age, ramp=memory.ramp, position=position[memory.rows])
    assert_equal("out", out, g.out)
    (out * g.upstream).sum().backward()
    assert_gradients(g, attention, position, memory=remembered, compressed=compressed, block=block)

    kept = fade(age + 4, span.squeeze(-1), memory.ramp) > 0
    assert_equal("pooled kept", entries.hidden[kept & (entries.born > 1)].view(2, C, 12), g.compressed_after)
    assert_equal("memories kept", entries.hidden[kept & (entries.born == 1)].view(2, L, 12), g.memory_after)


def test_adaptive_span_mask_and_loss():
    g = golden("adaptive_mask")
    memory = AdaptiveSpan(5, g.max_span, g.ramp, g.alpha).double()
    memory.load_state_dict({"ratio": g.ratio})
    span = memory.span(None)
    mask = fade(torch.arange(g.max_span, 0, -1), span.T, g.ramp)  # (H, L), the oldest distance first
    assert_equal("mask", mask, g.mask)
    loss = memory.loss(span, None, None, 1, 1)
    assert_equal("loss", loss, torch.tensor(g.loss, dtype=torch.double))
    ((mask * g.upstream).sum() + loss).backward()
    assert_equal("gradient of ratio", memory.ratio.grad, g.grad_ratio, 1e-7)


def over_six_blocks_then_a_training_step(g, expire, zeros, tolerance):
    model = golden_model(g, expire).eval()
    state = zero_state(2, zeros)
    for number, tokens in enumerate(g.tokens[:, :24].split(4, 1)):
        before = state
        scores, state, _ = model(tokens, state)
        assert_equal(f"log p, block {number}", log_softmax(scores, -1), g.logp[number], tolerance)
        if expire:  # theirs count the whole current block, ours only those in it that can still be seen
            kept = [memory.offsets.diff() for memory in state["layers"]]
            fresh = [
                torch.stack([(part >= 4 * number).sum() for part in memory.time.split(count.tolist())])
                for memory, count in zip(state["layers"], kept, strict=True)
            ]
            assert torch.equal(torch.stack(kept) - torch.stack(fresh) + 4, g.alive_exact[number])

    scores, _, figures = model.train()(g.tokens[:, 20:24], before)
    nll = cross_entropy(scores.flatten(0, 1), g.tokens[:, 21:25].flatten())
    assert abs(nll.item() - g.train_nll) < tolerance
    assert abs(figures["span_loss"].item() - g.train_aux) < 5 * tolerance
    (nll + figures["span_loss"]).backward()
    reference = parameters(g, "grad_")
    for parameter, tensor in model.named_parameters():
        assert_equal(parameter, tensor.grad, reference[parameter], 5 * tolerance)


def test_transformer_xl_over_six_blocks_then_a_training_step():
    over_six_blocks_then_a_training_step(golden("model_fixed"), expire=False, zeros=12, tolerance=2e-11)


def test_expire_span_over_six_blocks_then_a_training_step(tolerance):
    over_six_blocks_then_a_training_step(golden("model_expire"), expire=True, zeros=4, tolerance=tolerance)
