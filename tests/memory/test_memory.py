"""Memories: exact deletion, closed forms of size and loss, independence of the block size, bad input."""

import inspect
import math
import re
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from assertions import assert_equal
from small_models import MECHANISMS, run_in_blocks, small_model
from tiny_config import compose_config

import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Mechanism, Transformer, TransformerConfig, TransXL
from expire_span.memory.block_loss import BlockLoss
from expire_span.memory.mechanism import visible_distances
from expire_span.memory.metrics import memory_size
from expire_span.memory.packed import concatenate, empty, from_dense, keep_rows
from expire_span.runner.build import build_model
from expire_span.runner.config.schema import validate


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(11, (3, 3 * 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reach():
    """Episodes of random lengths, which begin anywhere in a block."""
    starts = torch.rand(3, 3 * 64, generator=torch.Generator().manual_seed(2)) < 0.02
    time = torch.arange(3 * 64).expand(3, -1)
    return time - (time * starts).cummax(1).values


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_the_same_text_in_blocks_of_1_7_and_64_gives_the_same_outputs_and_memory_size(kind, pre_norm, tokens):
    model = small_model(kind, pre_norm)
    with torch.no_grad():
        whole, state, size = run_in_blocks(model, tokens, 64)
        for block_size in (1, 7):
            logits, other_state, other_size = run_in_blocks(model, tokens, block_size)
            assert_equal(f"logits in blocks of {block_size}", logits, whole)
            assert other_size == pytest.approx(size, rel=1e-6)
            for memory, other in zip(state["layers"], other_state["layers"], strict=True):
                assert torch.equal(memory.offsets, other.offsets)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_deleting_memories_with_m_0_changes_no_later_output(kind, tokens, monkeypatch):
    model = small_model(kind)
    with torch.no_grad():
        deleting, state, _ = run_in_blocks(model, tokens, 16)
        monkeypatch.setattr(transformer, "keep_rows", lambda memory, *_: memory)
        keeping, everything, _ = run_in_blocks(model, tokens, 16)
    assert_equal("logits", deleting, keeping, 1e-13)
    assert len(state["layers"][1].time) < len(everything["layers"][1].time)


def naive_held(kind, mechanism, time, hidden):
    """How many memories the next query, at timestep `time`, can see with any head: counted one by one."""
    if kind == "compressive":
        return min(time, mechanism.max_span) + min(max(time - mechanism.max_span, 0) // 4, mechanism.compressed_size)
    held = 0
    for i in range(time):
        distance = time - i
        if kind == "expire_span":
            spans = (mechanism.max_span * torch.sigmoid(hidden[i] @ mechanism.weight + mechanism.bias)).tolist()
        elif kind == "adaptive_span":
            spans = (mechanism.max_span * mechanism.span_ratio + 1).tolist()
        else:
            spans = mechanism.max_span
        spans = spans if isinstance(spans, list) else [spans]
        in_reach = kind == "expire_span" or distance <= mechanism.max_span
        held += in_reach and any(1 + (span - distance) / mechanism.ramp > 0 for span in spans)
    return held


@pytest.mark.parametrize("kind", MECHANISMS)
def test_memory_held_is_the_count_of_the_memories_that_the_next_query_can_see_with_any_head(kind, tokens, monkeypatch):
    model, state = small_model(kind), None
    with torch.no_grad():
        monkeypatch.setattr(transformer, "keep_rows", lambda memory, *_: memory)
        _, everything, _ = run_in_blocks(model, tokens[:1], 16)
        monkeypatch.undo()
        state = model.initial_state(1)
        for block, block_tokens in enumerate(tokens[:1].split(16, 1), start=1):
            _, state, metrics = model(block_tokens, state)
            expected = [
                naive_held(kind, mechanism, 16 * block, memory.hidden)
                for mechanism, memory in zip(model.mechanisms, everything["layers"], strict=True)
            ]
            assert [metrics[f"memory/held_layer_{layer}"] for layer in range(2)] == expected
            assert metrics["memory/held"] == sum(expected) / 2


def test_what_transformer_xl_holds_is_what_a_query_sees_and_is_less_than_that_where_heads_differ(tokens):
    sizes = {}
    with torch.no_grad():
        for kind in ("trans_xl", "adaptive_span"):
            model = small_model(kind)
            _, state, _ = run_in_blocks(model, tokens[:, :128], 64)
            metrics = model(tokens[:, 128:], state)[2]
            sizes[kind] = metrics["memory/size"].item(), metrics["memory/held"]
    assert sizes["trans_xl"] == (40, 40)
    assert sizes["adaptive_span"][0] < sizes["adaptive_span"][1]


@pytest.mark.parametrize("ratio", [0.95, 1.0])
def test_adaptive_span_neither_sees_nor_holds_more_than_max_span_memories(ratio):
    mechanism = AdaptiveSpan(num_heads=2, max_span=20, ramp=8.0, alpha=0.1, init_span_ratio=ratio)
    model = Transformer(TransformerConfig(5, 8, 2, 16), [mechanism])
    state = model.initial_state(2)
    for tokens in torch.randint(5, (2, 60)).split(6, 1):
        _, state, metrics = model(tokens, state)
    assert metrics["memory/size"] == metrics["memory/held"] == 20


def test_a_memory_of_expire_span_with_e_near_max_span_fades_over_a_ramp_beyond_it():
    mechanism = ExpireSpan(8, max_span=20, ramp=8.0, alpha=0.1, num_positions=6)
    torch.nn.init.constant_(mechanism.bias, 30.0)  # e_i = L
    model = Transformer(TransformerConfig(5, 8, 2, 16), [mechanism])
    state = model.initial_state(2)
    for tokens in torch.randint(5, (2, 60)).split(6, 1):
        _, state, metrics = model(tokens, state)
    assert metrics["memory/size"] == metrics["memory/held"] == 20 + 8 - 1


@pytest.mark.parametrize("kind", ["expire_span", "adaptive_span", "trans_xl", "compressive"])
def test_max_reach_is_the_farthest_distance_at_which_a_token_changes_an_output(kind):
    mechanism = {
        "expire_span": ExpireSpan(8, max_span=12, ramp=4.5, alpha=0.0, num_positions=4, init_span_ratio=0.5),
        "adaptive_span": AdaptiveSpan(2, max_span=12, ramp=4, alpha=0.0, init_span_ratio=1.0),
        "trans_xl": TransXL(12),
        "compressive": Compressive(8, compressed_size=2, compression_rate=3),
    }[kind]
    if kind == "expire_span":
        torch.nn.init.constant_(mechanism.bias, 50.0)  # spans of L
    config = TransformerConfig(vocab_size=5, hidden_size=8, num_heads=2, feedforward_size=8)
    model = Transformer(config, [mechanism]).double().eval()
    tokens = torch.randint(5, (1, 60))
    outputs, farthest = run_in_blocks(model, tokens, 4)[0], 0
    for position in range(20, 24):
        changed_tokens = tokens.clone()
        changed_tokens[0, position] = (tokens[0, position] + 1) % 5
        changed = (run_in_blocks(model, changed_tokens, 4)[0] - outputs)[0].abs().amax(-1) > 1e-12  # (time,)
        farthest = max(farthest, int(changed.nonzero().max()) - position)
    assert farthest == model.max_reach()
    assert model.max_reach(span_cap=5) == min(farthest, 4 + math.ceil(mechanism.ramp))


def test_no_query_sees_two_memories_of_compressive_at_the_same_distance():
    """So the Triton kernels may store the gradient of rel, and need not add to it."""
    model = Compressive(max_span=7, compressed_size=5, compression_rate=3)
    block, now, memory = 4, 0, empty(2, 1, torch.zeros(1))
    for _ in range(12):
        time = now + torch.arange(block)
        memory = concatenate(memory, model.pool(memory, time), from_dense(torch.zeros(2, block, 1), time))
        now += block
        first_sample = slice(int(memory.offsets[1]))
        distance = (time[:, None] - memory.time)[:, first_sample]  # (T, S)
        span, min_distance = model.span(memory)[first_sample, 0], memory.min_distance[first_sample]
        visible = (distance >= min_distance) & (distance < span + model.ramp)  # (T, S)
        for distances, seen in zip(distance, visible, strict=True):
            assert len(set(distances[seen].tolist())) == seen.sum()


def test_expire_span_keeps_different_numbers_per_sample_and_layer(tokens):
    with torch.no_grad():
        _, state, _ = run_in_blocks(small_model("expire_span"), tokens, 16)
    counts = torch.stack([memory.offsets.diff() for memory in state["layers"]])  # (layers, B)
    assert counts[0].unique().numel() > 1
    assert not torch.equal(counts[0], counts[1])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_an_episode_is_not_influenced_by_the_one_before(kind, tokens, reach):
    model = small_model(kind)
    last_start = int((tokens.shape[1] - 1 - reach[0, -1]).item())
    with torch.no_grad():
        whole, state, _ = run_in_blocks(model, tokens[:1], 16, reach[:1])
        alone, _, _ = run_in_blocks(model, tokens[:1, last_start:], 16, reach[:1, last_start:])
    if kind == "compressive":  # a pooled state that begins with an episode's first state is hidden
        span = model.mechanisms[0].max_span
        whole, alone = whole[:, : last_start + span], alone[:, :span]
    assert_equal("logits", whole[:, last_start:], alone)
    assert all((memory.time >= last_start - 1).all() for memory in state["layers"])  # earlier ones are deleted


def random_memories(max_reach=None):
    """Ages, minimum distances, samples and spans of random memories, and the block size and reach of the queries."""
    generator = torch.Generator().manual_seed(4)
    batch_size, block_size, per_sample = 3, 9, 50
    total = batch_size * per_sample
    age = torch.randint(-block_size + 1, 40, (total,), generator=generator)
    min_distance = torch.randint(1, 6, (total,), generator=generator)
    sample = torch.arange(batch_size).repeat_interleave(per_sample)
    reach = None
    if max_reach is not None:
        episode_start = torch.randint(-40, block_size, (batch_size, 1), generator=generator)
        steps = torch.arange(block_size) - episode_start
        reach = torch.where(steps >= 0, steps, steps + 60).clamp(max=max_reach)
    span = torch.rand(total, 1, generator=generator, dtype=torch.double) * 50 - 5
    span[::7] = span[::7].round()  # integer spans are the edge cases
    return age, min_distance, sample, block_size, reach, span


@pytest.mark.parametrize("max_reach", [None, 25, 10**6], ids=str)
def test_memory_size_in_closed_form_is_the_count_of_m_above_0(max_reach):
    age, min_distance, sample, block_size, reach, span = random_memories(max_reach)
    size = memory_size(span, 4.0, *visible_distances(age, min_distance, sample, block_size, reach), 3 * block_size)
    count = 0
    for i in range(len(age)):
        for t in range(block_size):
            distance = int(age[i]) + t
            within = reach is None or distance <= int(reach[sample[i], t])
            count += distance >= int(min_distance[i]) and within and 1 + (span[i].item() - distance) / 4.0 > 0
    assert size.item() == pytest.approx(count / (3 * block_size))
    assert count > 0


@pytest.mark.parametrize("max_reach", [None, 25], ids=str)
def test_span_loss_in_closed_form_is_the_sum_over_the_ramp_with_its_gradient(max_reach):
    age, min_distance, sample, block_size, reach, span = random_memories(max_reach)
    mechanism = ExpireSpan(hidden_size=1, max_span=50, ramp=4.0, alpha=0.3, num_positions=0)
    span.requires_grad_()
    nearest, farthest = visible_distances(age, min_distance, sample, block_size, reach)
    loss = mechanism.loss(span, nearest, farthest, batch_size=3, block_size=block_size)
    total = torch.zeros((), dtype=torch.double)
    for i in range(len(age)):
        for t in range(block_size):
            distance = int(age[i]) + t
            within = reach is None or distance <= int(reach[sample[i], t])
            if distance >= int(min_distance[i]) and within and 0 < 1 + (span[i].item() - distance) / 4.0 < 1:
                total = total + span[i, 0] - distance
    reference = 0.3 / (4.0 * block_size * 3) * total
    assert loss.item() == pytest.approx(reference.item())
    gradient, expected = (torch.autograd.grad(value, span)[0] for value in (loss, reference))
    assert_equal("gradient", gradient, expected)


def test_the_ablation_takes_the_span_loss_on_the_tokens_of_the_block_alone():
    block_size, older = 8, torch.tensor([30, 9, 2, 1])
    age = torch.cat([older, -torch.arange(block_size)])  # (12,)
    nearest, farthest = visible_distances(age, torch.ones_like(age), torch.zeros_like(age), block_size, reach=None)
    span = torch.rand(len(age), 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mechanism = BlockLoss(16, max_span=32, ramp=4, alpha=0.1, num_positions=8)
    loss = mechanism.loss(span, nearest, farthest, batch_size=1, block_size=block_size)
    assert loss.item() == pytest.approx(0.1 / block_size * span[len(older) :].sum().item())
    [gradient] = torch.autograd.grad(loss, span)
    assert gradient.flatten().tolist() == pytest.approx([0.0] * len(older) + [0.1 / block_size] * block_size)


def test_packed_rows_stay_with_their_sample_when_concatenated_and_deleted():
    g = torch.Generator().manual_seed(0)
    first = keep_rows(from_dense(torch.randn(3, 5, 2, generator=g), torch.arange(5)), torch.rand(15, generator=g) < 0.5)
    second = from_dense(torch.randn(3, 2, 2, generator=g), torch.arange(5, 7))
    both = concatenate(concatenate(empty(3, 2, torch.zeros(1)), first), second)
    for sample in range(3):
        rows = slice(*both.offsets[sample : sample + 2].tolist())
        expected = [m.hidden[slice(*m.offsets[sample : sample + 2].tolist())] for m in (first, second)]
        assert torch.equal(both.hidden[rows], torch.cat(expected))
        assert (both.time[rows].diff() > 0).all()


def test_spans_start_at_the_initial_ratio_and_stay_float32_under_bfloat16():
    mechanism = ExpireSpan(hidden_size=8, max_span=65536, ramp=128, alpha=1e-6, num_positions=16, init_span_ratio=0.01)
    block = from_dense(torch.randn(2, 3, 8), torch.arange(3))
    with torch.autocast("cpu", torch.bfloat16):
        span = mechanism.span(block)
    assert span.dtype == torch.float32
    assert_equal("span", span, torch.full((6, 1), 655.36), 0.01)
    assert mechanism.bias.item() < 0


def test_random_drop_hides_memories_in_training_only_and_deletes_none(tokens):
    model = small_model("expire_span")
    mechanisms = [ExpireSpan(12, 60, 3.0, 0.1, num_positions=16, random_drop=True) for _ in range(2)]
    dropping = Transformer(model.config, mechanisms).double()
    dropping.load_state_dict(model.state_dict())
    with torch.no_grad():
        _, state, _ = run_in_blocks(model, tokens, 16)
        expected, expected_state, _ = model(tokens[:, :16], state)
        assert torch.equal(dropping.eval()(tokens[:, :16], state)[0], expected)
        dropping.train()
        outputs = [dropping(tokens[:, :16], state) for _ in range(8)]
    assert any(not torch.equal(logits, expected) for logits, _, _ in outputs)
    for _, next_state, _ in outputs:  # deletion goes by the true span
        assert torch.equal(next_state["layers"][0].time, expected_state["layers"][0].time)


def test_the_spans_of_adaptive_span_stay_between_0_and_max_span():
    mechanism = AdaptiveSpan(num_heads=2, max_span=30, ramp=4.0, alpha=0.1)
    with torch.no_grad():
        mechanism.span_ratio.copy_(torch.tensor([-0.3, 1.7]))
    assert torch.equal(mechanism.span(None), torch.tensor([[1.0, 31.0]]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TransXL(0), "^max_span must be an integer of at least 1, got 0"),
        (lambda: AdaptiveSpan(2, 10, 0, 0.1), "^ramp must be a positive number"),
        (
            lambda: ExpireSpan(4, 10, 2, 0.1, num_positions=-1),
            "^num_positions must be an integer of at least 0, got -1",
        ),
        (
            lambda: ExpireSpan(4, 10, 2, 0.1, 4, init_span_ratio=1.0),
            "^init_span_ratio must lie strictly between 0 and 1",
        ),
        (lambda: ExpireSpan(4, 10, math.nan, 0.1, 4), "^ramp must be a positive number"),
        (lambda: ExpireSpan(4, 10, 2, math.nan, 4), "^alpha must be a number that is not negative, got nan"),
        (lambda: AdaptiveSpan(2, 10, 2, math.nan), "^alpha must be a number that is not negative, got nan"),
        (lambda: ExpireSpan(4, 10, 2, 0.1, 4, pre_div=0), "^pre_div must be positive, got 0"),
        (lambda: TransformerConfig(0, 8, 2, 8), "^vocab_size must be an integer of at least 1, got 0"),
        (lambda: TransformerConfig(5, 0, 2, 8), "^hidden_size must be an integer of at least 1, got 0"),
        (lambda: Transformer(TransformerConfig(5, 8, 2, 8), TransXL(4)), "mechanisms must be one per layer"),
        (lambda: TransXL(10.5), "^max_span must be an integer of at least 1, got 10.5"),
        (lambda: Compressive(10, 4, 1.5), "^compression_rate must be an integer of at least 1, got 1.5"),
        (lambda: AdaptiveSpan(0, 10, 2, 0.1), "^num_heads must be an integer of at least 1, got 0"),
        (lambda: TransformerConfig(5, 8, 2, 8, num_classes=0), "^num_classes must be an integer of at least 1, got 0"),
        (
            lambda: Transformer(TransformerConfig(5, 8, 2, 8), [TransXL(4), ExpireSpan(4, 10, 2, 0.1, 4)]),
            "^hidden_size of layer 1's ExpireSpan must be the config's 8, got 4",
        ),
        (
            lambda: Transformer(TransformerConfig(5, 8, 2, 8), [AdaptiveSpan(1, 10, 2, 0.1)]),
            "^num_heads of layer 0's AdaptiveSpan must be the config's 2, got 1",
        ),
        (lambda: Compressive(10, 0), "^compressed_size must be an integer of at least 1, got 0"),
        (lambda: TransformerConfig(5, 10, 3, 8), "^num_heads must divide hidden_size=10, got 3"),
    ],
)
def test_impossible_sizes_are_refused_with_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_compressive_refuses_blocks_longer_than_its_span():
    config = TransformerConfig(vocab_size=5, hidden_size=4, num_heads=1, feedforward_size=4)
    model = Transformer(config, [Compressive(max_span=8, compressed_size=2)])
    with pytest.raises(ValueError, match="too short for blocks of 12"):
        model(torch.zeros(1, 12, dtype=torch.long), model.initial_state(1))


def test_the_papers_enwik8_model_has_38_million_parameters():
    config = validate(compose_config("task=enwik8", "model=expire_span", "size=paper"))
    with torch.device("meta"):
        model = build_model(config, SimpleNamespace(vocab_size=256, num_classes=256), torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(38e6, rel=0.02)


def test_expire_span_adds_d_plus_1_parameters_per_layer():
    mechanism = ExpireSpan(64, max_span=100, ramp=16, alpha=1e-6, num_positions=16)
    assert sum(parameter.numel() for parameter in mechanism.parameters()) == 65


def test_the_mechanism_in_the_documentation_learns_its_span_and_forgets():
    example = re.search(r"^    class LayerSpan.*?(?=^\S)", inspect.getdoc(Mechanism), re.MULTILINE | re.DOTALL)
    namespace = {"torch": torch, "nn": torch.nn, "Mechanism": Mechanism}
    exec(dedent(example.group()), namespace)
    config = TransformerConfig(vocab_size=5, hidden_size=4, num_heads=2, feedforward_size=4)
    model = Transformer(config, [namespace["LayerSpan"](max_span=20, ramp=4, alpha=0.1)])  # the span starts at 10
    tokens = torch.randint(5, (2, 64))
    _, state, _ = model(tokens, model.initial_state(2))
    logits, state, metrics = model(tokens, state)
    logits.square().mean().backward(retain_graph=True)
    task_gradient = model.mechanisms[0].logit.grad.clone()
    metrics["span_loss"].backward()
    assert task_gradient.abs().item() > 0
    assert model.mechanisms[0].logit.grad.item() > task_gradient.item()  # the loss shortens the span
    assert state["layers"][0].offsets.diff().tolist() == [13, 13]  # distances below 10 + 4


def test_printing_a_model_shows_the_arguments_of_its_mechanisms():
    mechanisms = [
        ExpireSpan(8, max_span=64, ramp=4.0, alpha=1e-6, num_positions=8, random_drop=True),
        AdaptiveSpan(2, max_span=16, ramp=4.0, alpha=0.1),
        TransXL(16),
        Compressive(16, compressed_size=4),
    ]
    text = str(Transformer(TransformerConfig(5, 8, 2, 16), mechanisms))
    assert (
        "ExpireSpan(hidden_size=8, max_span=64, ramp=4.0, alpha=1e-06, num_positions=8, init_span_ratio=0.1, "
        "pre_div=1.0, random_drop=True)"
    ) in text
    assert "AdaptiveSpan(num_heads=2, max_span=16, ramp=4.0, alpha=0.1, init_span_ratio=0.0, num_positions=16)" in text
    assert "TransXL(max_span=16, num_positions=16)" in text
    assert "Compressive(max_span=16, compressed_size=4, compression_rate=4)" in text
