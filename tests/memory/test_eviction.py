"""Mechanisms that hold a fixed number of memories keep those of the highest priority, of each stream."""

import math

import pytest
import torch
from small_models import NEWER_MECHANISMS, run_in_blocks, small_model

from expire_span import Decoder
from expire_span.memory.eviction import is_top_of_sample
from expire_span.memory.random_eviction import hashed
from expire_span.memory.trans_xl import TransXL

HEADS, HEAD_DIM, BLOCK, STREAMS, KEPT, SPAN = 3, 4, 8, 2, 12, 40
EVICTIONS = ["key_norm", "tova", "random_eviction"]


def head_rows(projection, hidden):
    return projection(hidden).unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1)  # (H, n, D)


def weights_by_definition(layer, hidden, times, query, table):
    """The softmax of the query at timestep `query` over what was at `times` of one stream's states (T, d): (H, n)."""
    q, k = head_rows(layer.attention.query_proj, hidden), head_rows(layer.attention.key_proj, hidden)
    scores = torch.empty(HEADS, len(times)).double()
    for head in range(HEADS):
        for index, time in enumerate(times):
            distance = query - time
            score = q[head, query] @ (k[head, time] + table[distance - 1])
            scores[head, index] = score / math.sqrt(HEAD_DIM) if 1 <= distance <= SPAN else -math.inf
    return scores.softmax(-1)


def priorities_by_definition(kind, layer, hidden, times, end, table):
    """What is kept first of the memories at `times`, after the block that ends before timestep `end`."""
    if kind == "key_norm":
        norms = head_rows(layer.attention.key_proj, hidden)[:, times].norm(dim=-1).mean(0).tolist()
        return [-round(norm, 4) for norm in norms]  # equal tokens have equal keys in the first layer
    if kind == "random_eviction":
        return hashed(torch.tensor(times), torch.full((len(times),), end)).tolist()
    weights = weights_by_definition(layer, hidden, times[:-1], end - 1, table).mean(0)  # none sees the last one yet
    return [*weights.tolist(), math.inf]


@torch.no_grad()
@pytest.mark.parametrize("kind", EVICTIONS)
def test_the_memories_of_the_highest_priority_are_kept(kind):
    model, layer_index = small_model(kind, pre_norm=True), 0
    tokens = torch.randint(11, (STREAMS, 10 * BLOCK), generator=torch.Generator().manual_seed(1))
    layer, state = model.layers[layer_index], model.initial_state(STREAMS)
    hidden = layer.attention_norm(model.embed(tokens))  # of the first layer, (B, T, d)
    held = [[] for _ in range(STREAMS)]
    for end in range(BLOCK, tokens.shape[1] + 1, BLOCK):
        _, state, metrics = model(tokens[:, end - BLOCK : end], state)
        memory = state["layers"][layer_index]
        for stream in range(STREAMS):
            times = [time for time in [*held[stream], *range(end - BLOCK, end)] if end - time <= SPAN]
            priority = priorities_by_definition(kind, layer, hidden[stream], times, end, model.position)
            ranked = sorted(range(len(times)), key=lambda index: (-priority[index], -times[index]))
            held[stream] = sorted(times[index] for index in ranked[:KEPT])
            assert memory.time[slice(*memory.offsets[stream : stream + 2].tolist())].tolist() == held[stream]
    assert metrics["memory/held"] == KEPT == model.mechanisms[0].max_memories


@torch.no_grad()
def test_the_attention_that_memories_get_is_the_sum_of_the_weights_of_the_queries():
    class Recorder(TransXL):
        def keep(self, memory, age, alive, mass):
            self.mass = {queries: mass(slice(*queries)) for queries in ((None,), (2, 4))}
            return alive

    model = small_model("trans_xl", pre_norm=True)
    model.layers[0].mechanism = recorder = Recorder(SPAN)
    tokens = torch.randint(11, (1, 30), generator=torch.Generator().manual_seed(1))
    model(tokens[:, 20:], model(tokens[:, :20], model.initial_state(1))[1])
    hidden = model.layers[0].attention_norm(model.embed(tokens))[0]
    for queries, chosen in (((None,), range(20, 30)), ((2, 4), range(22, 24))):
        expected = torch.zeros(HEADS, 30).double()
        for query in chosen:
            times = list(range(query))
            expected[:, :query] += weights_by_definition(model.layers[0], hidden, times, query, model.position)
        torch.testing.assert_close(recorder.mass[queries], expected.T, rtol=0, atol=1e-12)


def test_the_top_of_each_sample_is_what_sorting_finds():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randint(5, (200,), generator=generator)  # in any order, as where they have several parts
    priority = torch.randint(30, (200,), generator=generator).double()  # with many that are equal
    top = is_top_of_sample(priority, sample, 7)
    for each in range(5):
        rows = (sample == each).nonzero().flatten().tolist()
        expected = sorted(rows, key=lambda row: (-priority[row], -row))[:7]
        assert top[rows].nonzero().flatten().tolist() == [index for index, row in enumerate(rows) if row in expected]


def test_random_priorities_are_uniform_and_of_no_apparent_order():
    time, now = torch.meshgrid(torch.arange(1000), 1000 + 64 * torch.arange(100), indexing="ij")
    values = hashed(time.flatten(), now.flatten()).view(1000, 100)
    assert values.flatten().histc(10, 0, 1) / values.numel() == pytest.approx([0.1] * 10, abs=0.004)
    for one, other in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("kind", EVICTIONS)
def test_gradients_reach_what_the_memories_in_the_block_are_made_of(kind):
    model = small_model(kind, pre_norm=True).train()
    state = model.initial_state(1)
    for tokens in torch.randint(11, (1, 24), generator=torch.Generator().manual_seed(1)).split(8, 1):
        logits, state, _ = model(tokens, state)
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert all(not memory.hidden.requires_grad for memory in state["layers"])


def test_a_number_of_memories_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_kept must be an integer of at least 1, got 0"):
        type(NEWER_MECHANISMS["tova"]())(max_span=40, num_kept=0)


@pytest.mark.parametrize("kind", NEWER_MECHANISMS)
def test_it_works_in_inference_mode(kind):
    model = small_model(kind, pre_norm=True)
    tokens = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run_in_blocks(model, tokens, 10)[0]
    with torch.inference_mode():
        logits = run_in_blocks(model, tokens, 10)[0]
        decoder = Decoder(model, model.initial_state(2))
        for t in range(30):
            decoder(tokens[:, t])
    torch.testing.assert_close(logits, expected)
