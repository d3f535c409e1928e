"""Values and gradients equal those of the authors' released code, in float64."""

import pytest
import torch
from assertions import assert_equal
from naive_attention import naive_packed_attention
from reference_data import load_reference, nearest_first, packed_memory, parameters, reference_model, zero_state
from torch.nn.functional import cross_entropy, log_softmax

import expire_span.memory_attention as memory_attention
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, TransXL
from expire_span.attention import soft_mask
from expire_span.memory.mechanism import visible_distances
from expire_span.memory.packed import concatenate, from_dense
from expire_span.memory_attention import MemoryAttention

PROJECTIONS = {"query_proj": "wq", "key_proj": "wk", "value_proj": "wv", "output_proj": "wo"}  # ours: theirs


def attention_of(data):
    attention = MemoryAttention(12, data.heads).double()
    attention.load_state_dict({f"{ours}.weight": getattr(data, theirs) for ours, theirs in PROJECTIONS.items()})
    return attention


def assert_gradients(data, attention, position, tolerance=1e-10, **leaves):
    for ours, theirs in PROJECTIONS.items():
        assert_equal(ours, attention.get_submodule(ours).weight.grad, getattr(data, f"grad_{theirs}"), tolerance)
    assert_equal("position", position.grad, nearest_first(data.grad_key_pe), tolerance)
    for name, leaf in leaves.items():
        assert_equal(name, leaf.grad, getattr(data, f"grad_{name}"), tolerance)


def expire_span_of(data, weight, bias, hidden_size):
    mechanism = ExpireSpan(hidden_size, data.max_span, data.ramp, data.alpha, num_positions=4).double()
    mechanism.load_state_dict({"weight": weight.flatten(), "bias": bias.squeeze()})
    return mechanism


def span_losses(mechanism, memory, span, block_size):
    """The span loss of each sample alone."""
    age, sample = -memory.time, memory.time.new_zeros(len(memory.time))
    nearest, farthest = visible_distances(age, memory.min_distance, sample, block_size, None)
    samples = [slice(*ends) for ends in memory.offsets.unfold(0, 2, 1).tolist()]
    losses = [mechanism.loss(span[rows], nearest[rows], farthest[rows], 1, block_size) for rows in samples]
    return torch.stack(losses)


def attend(attention, block, memory, span, **mask_inputs):
    """Attend from the block to all memories, its own states among them."""
    memory = memory._replace(kv=(*attention.keys_and_values(memory.hidden), span))
    return attention(block, memory, age=-memory.time, **mask_inputs)


def test_spans_masks_span_loss_and_gradients_of_expire_span_equal_the_authors():
    data = load_reference("span_plain")
    mechanism = expire_span_of(data, data.weight, data.bias, 6)
    hidden = data.hidden.requires_grad_()
    memory = packed_memory(hidden, data.ages.long())
    span = mechanism.span(memory)
    e = span.view(2, -1)
    assert_equal("span", e, data.span)
    assert_equal("remaining", e - data.ages, data.remaining_at_first_query)
    distance = data.ages[:, None] + torch.arange(data.block)[:, None]  # (B, M, S)
    mask = soft_mask(distance, e[:, None], data.ramp)  # (B, M, S)
    assert_equal("mask", mask, data.mask)
    loss = span_losses(mechanism, memory, span, data.block)
    assert_equal("loss", loss, data.loss)
    ((mask * data.upstream).sum() + loss.sum()).backward()
    assert_equal("gradient of hidden", hidden.grad, data.grad_hidden)
    assert_equal("gradient of w", mechanism.weight.grad, data.grad_weight)
    assert_equal("gradient of b", mechanism.bias.grad, data.grad_bias.squeeze())


@pytest.fixture(params=["ours", "with_their_epsilon"])
def tolerance(request, monkeypatch):
    """The authors add 1e-8 to the sum of the masked weights. A naive loop that does so too agrees to 1e-10."""
    if request.param == "ours":
        return 1e-7
    monkeypatch.setattr(memory_attention, "packed_span_attention", naive_packed_attention(epsilon=1e-8))
    return 1e-10


def test_expire_span_attention_and_gradients_equal_the_authors(tolerance):
    data = load_reference("attn_expire")
    attention, mechanism = attention_of(data), expire_span_of(data, data.span_weight, data.span_bias, 12)
    position = nearest_first(data.key_pe).requires_grad_()
    old, block = data.memory.requires_grad_(), data.block.requires_grad_()
    memory = packed_memory(torch.cat([old, block], 1), data.ages.long())
    span = mechanism.span(memory)
    out = attend(attention, block, memory, span, ramp=data.ramp, position=position)
    assert_equal("out", out, data.out, tolerance)
    loss = span_losses(mechanism, memory, span, 4)
    assert_equal("loss", loss, data.loss)
    ((out * data.upstream).sum() + loss.sum()).backward()
    assert_equal("span_weight", mechanism.weight.grad, data.grad_span_weight[0], 5 * tolerance)
    assert_equal("span_bias", mechanism.bias.grad, data.grad_span_bias[0], 5 * tolerance)
    assert_gradients(data, attention, position, 5 * tolerance, memory=old, block=block)


def test_transformer_xl_attention_and_gradients_equal_the_authors():
    data = load_reference("attn_fixed")
    attention, mechanism = attention_of(data), TransXL(data.max_span)
    position = nearest_first(data.key_pe).requires_grad_()
    old, block = data.memory.requires_grad_(), data.block.requires_grad_()
    memory = concatenate(packed_memory(old, torch.arange(16, 0, -1).expand(2, -1)), from_dense(block, torch.arange(4)))
    out = attend(attention, block, memory, mechanism.span(memory), ramp=mechanism.ramp, position=position)
    assert_equal("out", out, data.out)
    (out * data.upstream).sum().backward()
    assert_gradients(data, attention, position, memory=old, block=block)


def test_compressive_attention_gradients_and_kept_memories_equal_the_authors():
    data = load_reference("attn_compressive")
    L, C, c = data.normal_memories, data.compressed_memories, data.rate
    attention, mechanism = attention_of(data), Compressive(L, C, c)
    old, compressed, block = (tensor.requires_grad_() for tensor in (data.memory, data.compressed, data.block))
    position = nearest_first(data.key_pe).requires_grad_()  # L rows, then C + 1 slots, each nearest first
    pooled_age = L + 1 + c * torch.arange(C, 0, -1)  # that of each one's oldest state, plus 1
    state = concatenate(
        packed_memory(compressed, pooled_age.expand(2, -1), min_distance=L + 1),
        packed_memory(old, torch.arange(L, 0, -1).expand(2, -1)),
    )
    pooled = mechanism.pool(state, torch.arange(4))
    memory = concatenate(concatenate(state, pooled), from_dense(block, torch.arange(4)))
    span = mechanism.span(memory)
    out = attend(attention, block, memory, span, ramp=mechanism.ramp, position=position[mechanism.rows])
    assert_equal("out", out, data.out)
    (out * data.upstream).sum().backward()
    assert_gradients(data, attention, position, memory=old, compressed=compressed, block=block)

    keep = soft_mask(4 - memory.time, span.squeeze(-1), mechanism.ramp) > 0
    pooled_rows, state_rows = keep & (memory.min_distance > 1), keep & (memory.min_distance == 1)
    assert_equal("pooled states kept", memory.hidden[pooled_rows].view(2, C, 12), data.compressed_after)
    assert_equal("hidden states kept", memory.hidden[state_rows].view(2, L, 12), data.memory_after)


def test_mask_loss_and_gradient_of_adaptive_span_equal_the_authors():
    data = load_reference("adaptive_mask")
    mechanism = AdaptiveSpan(5, data.max_span, data.ramp, data.alpha).double()
    mechanism.load_state_dict({"span_ratio": data.ratio})
    span = mechanism.span(None)
    mask = soft_mask(torch.arange(data.max_span, 0, -1), span.T, data.ramp)  # (H, L), the farthest distance first
    assert_equal("mask", mask, data.mask)
    loss = mechanism.loss(span, None, None, 1, 1)
    assert_equal("loss", loss, torch.tensor(data.loss, dtype=torch.double))
    ((mask * data.upstream).sum() + loss).backward()
    assert_equal("gradient of ratio", mechanism.span_ratio.grad, data.grad_ratio, 1e-7)


def assert_six_blocks_and_a_training_step_agree(data, expire, num_zeros, tolerance):
    model = reference_model(data, expire).eval()
    state = zero_state(2, num_zeros)
    for index, tokens in enumerate(data.tokens[:, :24].split(4, 1)):
        state_before = state
        logits, state, _ = model(tokens, state)
        assert_equal(f"log probs of block {index}", log_softmax(logits, -1), data.logp[index], tolerance)
        if expire:  # they count the whole current block, we only those states of it that can still be seen
            counts = [memory.offsets.diff() for memory in state["layers"]]
            new_counts = [
                torch.stack([(time >= 4 * index).sum() for time in memory.time.split(count.tolist())])
                for memory, count in zip(state["layers"], counts, strict=True)
            ]
            assert torch.equal(torch.stack(counts) - torch.stack(new_counts) + 4, data.alive_exact[index])

    logits, _, metrics = model.train()(data.tokens[:, 20:24], state_before)
    loss = cross_entropy(logits.flatten(0, 1), data.tokens[:, 21:25].flatten())
    assert abs(loss.item() - data.train_nll) < tolerance
    assert abs(metrics["span_loss"].item() - data.train_aux) < 5 * tolerance
    (loss + metrics["span_loss"]).backward()
    expected = parameters(data, "grad_")
    for name, parameter in model.named_parameters():
        assert_equal(name, parameter.grad, expected[name], 5 * tolerance)


def test_transformer_xl_equals_the_authors_over_six_blocks_and_a_training_step():
    data = load_reference("model_fixed")
    assert_six_blocks_and_a_training_step_agree(data, expire=False, num_zeros=12, tolerance=2e-11)


def test_expire_span_equals_the_authors_over_six_blocks_and_a_training_step(tolerance):
    data = load_reference("model_expire")
    assert_six_blocks_and_a_training_step_agree(data, expire=True, num_zeros=4, tolerance=tolerance)
