"""Mechanisms that came after the paper: each equals its own definition, deletes for real, and goes on from a state."""

import math

import pytest
import torch
from small_models import run_in_blocks, small_model

from expire_span import Alibi, Fox, Streaming
from expire_span.runner.run_folder.stream_states import memories_of, select_memories

HEADS, HIDDEN, TIMESTEPS = 3, 12, 70  # those of small_model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(11, (2, TIMESTEPS), generator=torch.Generator().manual_seed(1))


def definition(mechanism, hidden):
    """The soft mask m and what is added to the scores, (H, T, T) each, of one stream's normalized states (T, d)."""
    time = torch.arange(len(hidden))
    distance = time[:, None] - time
    m, added = (distance >= 1).double().expand(HEADS, -1, -1), torch.zeros(HEADS, len(hidden), len(hidden)).double()
    if isinstance(mechanism, Alibi):
        slopes = torch.tensor([2 ** (-8 * head / HEADS) for head in range(1, HEADS + 1)])
        return m * (distance <= mechanism.max_span), -slopes.double()[:, None, None] * distance
    if isinstance(mechanism, Streaming):
        return m * ((distance <= mechanism.max_span) | (time < mechanism.num_sinks)), added
    forget = torch.sigmoid(hidden @ mechanism.gates.weight.T + mechanism.gates.bias)  # (T, H)
    for t in range(len(hidden)):
        for i in range(t):
            added[:, t, i] = forget[i + 1 : t + 1].log().sum(0)
    if isinstance(mechanism, Fox):
        return m * (distance <= mechanism.max_span), added
    span = mechanism.max_span * torch.sigmoid(hidden @ mechanism.weight + mechanism.bias)  # (T,)
    return m * (1 + (span - distance) / mechanism.ramp).clamp(0, 1), added


def outputs_by_definition(model, tokens):
    """The logits (T, num_classes) of one stream, all of it at once, with a softmax over everything that is visible."""
    hidden = model.embed(tokens[None])[0]  # (T, d)
    distance = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    for layer in model.layers:
        normalized = layer.attention_norm(hidden) if layer.pre_norm else hidden
        attention = layer.attention
        query, key, value = (
            projection(normalized).unflatten(1, (HEADS, -1)).transpose(0, 1)  # (H, T, D)
            for projection in (attention.query_proj, attention.key_proj, attention.value_proj)
        )
        score = query @ key.transpose(1, 2)  # (H, T, T)
        table = model.position[: layer.mechanism.num_positions]
        for j in range(len(table)):
            score = score + (query @ table[j])[..., None] * (distance == j + 1)
        m, added = definition(layer.mechanism, normalized)
        weight = m * torch.exp(score / math.sqrt(HIDDEN // HEADS) + added)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
        attended = attention.output_proj((weight @ value).transpose(0, 1).flatten(1))
        if layer.pre_norm:
            hidden = hidden + attended
            hidden = hidden + layer.feedforward(layer.feedforward_norm(hidden))
        else:
            hidden = layer.attention_norm(hidden + attended)
            hidden = layer.feedforward_norm(hidden + layer.feedforward(hidden))
    return model.output_head(model.norm(hidden))


@torch.no_grad()
@pytest.mark.parametrize(("block_size", "pre_norm"), [(1, True), (7, True), (70, False)])
@pytest.mark.parametrize("kind", ["fox", "expire_fox", "alibi", "streaming"])
def test_blocks_of_any_length_equal_the_definition(kind, block_size, pre_norm, tokens):
    model = small_model(kind, pre_norm)
    logits = run_in_blocks(model, tokens, block_size)[0]
    for stream, stream_tokens in zip(logits, tokens, strict=True):
        torch.testing.assert_close(stream, outputs_by_definition(model, stream_tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["fox", "expire_fox"])
def test_gradients_of_all_parameters_equal_those_of_the_definition(kind, tokens):
    model = small_model(kind, pre_norm=True)
    model(tokens, model.initial_state(2))[0].square().sum().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.numel()]
    gradients = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()
    sum(outputs_by_definition(model, stream).square().sum() for stream in tokens).backward()
    assert all(parameter.grad.abs().max() > 0 for mechanism in model.mechanisms for parameter in mechanism.parameters())
    for gradient, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fox", "expire_fox"])
def test_what_the_gates_have_multiplied_to_less_than_the_threshold_is_deleted_and_nothing_else(kind, tokens):
    model = small_model(kind, pre_norm=True)
    for mechanism in model.mechanisms:
        mechanism.threshold = 1e-3
    for layer, memory in enumerate(run_in_blocks(model, tokens, 1)[1]["layers"]):
        for stream in range(2):
            rows = slice(*memory.offsets[stream : stream + 2].tolist())
            assert 0 < rows.stop - rows.start < 30
            assert (memory.log_decay[rows].amax(1) >= math.log(1e-3)).all()
            if layer == 0:  # whose hidden states deletion does not change
                hidden = model.layers[0].attention_norm(model.embed(tokens[stream : stream + 1])[0])
                m, added = definition(model.mechanisms[0], torch.cat([hidden, hidden[:1]]))  # the next query's row
                log_gate = model.mechanisms[0].log_gate(type(memory)(hidden[:1], *memory[1:4]))[0]  # of the next state
                visible = (m[:, -1, :-1] > 0).any(0) & (
                    (added[:, -1, :-1] - log_gate[:, None]).amax(0) >= math.log(1e-3)
                )
                assert memory.time[rows].tolist() == visible.nonzero().flatten().tolist()


@torch.no_grad()
def test_a_threshold_too_small_to_matter_changes_no_output_and_holds_less(tokens):
    model = small_model("fox", pre_norm=True)
    expected, everything, _ = run_in_blocks(model, tokens, 10)
    for mechanism in model.mechanisms:
        mechanism.threshold = 1e-8
    logits, state, _ = run_in_blocks(model, tokens, 10)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-7)
    assert len(state["layers"][1].time) < 0.7 * len(everything["layers"][1].time)


@torch.no_grad()
def test_sinks_stay_for_ever_and_all_else_for_the_last_timesteps(tokens):
    model = small_model("streaming", pre_norm=True)
    memory = run_in_blocks(model, tokens[:1], 10)[1]["layers"][0]
    assert memory.time.tolist() == [0, 1, 2, *range(TIMESTEPS - 20, TIMESTEPS)]
    assert len(memory.time) == model.mechanisms[0].max_memories


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fox", "expire_fox"])
def test_saved_memories_go_on_with_what_they_have_faded_by_also_when_streams_are_divided_anew(kind, tokens):
    model, later = (
        small_model(kind, pre_norm=True),
        torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(2)),
    )
    state = run_in_blocks(model, tokens, 10)[1]
    expected = model(later, state)[0]
    whole = memories_of([state], [slice(0, 2)], first=0)
    divided = [
        memories_of([state | {"layers": select_memories(whole, slice(i, i + 1))}], [slice(0, 1)], i)[0] for i in (0, 1)
    ]
    for saved in (whole, divided):
        layers = select_memories(saved, slice(0, 2))
        torch.testing.assert_close(
            model(later, {"step": state["step"], "layers": layers})[0], expected, rtol=0, atol=1e-12
        )


@torch.no_grad()
def test_the_bytes_of_gated_memories_include_what_they_have_faded_by(tokens):
    metrics = small_model("fox", pre_norm=True).float()(
        tokens, small_model("fox", pre_norm=True).float().initial_state(2)
    )[2]
    per_memory = 4 * HIDDEN + 8 + 8 + 4 * HEADS
    assert metrics["memory/bytes"] == pytest.approx(2 * (40 * per_memory + 8))


def test_the_gates_begin_with_half_lives_that_differ_from_head_to_head():
    gates = Fox(HIDDEN, 5, max_span=40, half_life=64).gates
    log_gate = gates(torch.randn(1, HIDDEN))[0]  # w is 0
    assert (log_gate * torch.tensor([64, 32, 16, 8, 4])).tolist() == pytest.approx([-math.log(2)] * 5, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_life": 0.0}, "half_life must be a positive number of timesteps, got 0.0"),
        ({"threshold": 0.0}, "threshold must lie strictly between 0 and 1, got 0.0"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fox(**{"hidden_size": HIDDEN, "num_heads": HEADS, "max_span": 40, **arguments})


@torch.no_grad()
def test_averages_of_spans_count_a_sinks_as_the_longest_other_one(tokens):
    model = small_model("streaming", pre_norm=True)
    assert model(tokens, model.initial_state(2))[2]["memory/span"] == model.mechanisms[0].max_span


def test_gates_and_pooled_memories_do_not_go_together():
    class Pooling(Fox):
        def pool(self, memory, time):
            return None

    with pytest.raises(ValueError, match="Pooling has pool and log_gate, which do not go together"):
        Pooling(HIDDEN, HEADS, max_span=40)
