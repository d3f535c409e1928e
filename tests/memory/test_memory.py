"""What a memory is worth, costs and weighs: exact deletion, closed forms, block size, bad input."""

from types import SimpleNamespace

import pytest
import torch
from tiny import composed
from tolerance import assert_equal

import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.memory.mechanism import memory_size, reached
from expire_span.memory.packed import dense, empty, join, select
from expire_span.runner.build import build_model
from expire_span.runner.settings import checked

MECHANISMS = {
    "trans_xl": lambda: TransXL(max_span=40),
    "adaptive_span": lambda: AdaptiveSpan(heads=3, max_span=40, ramp=4.0, alpha=0.1, init=0.4),
    "compressive": lambda: Compressive(max_span=68, compressed=6),
    "expire_span": lambda: ExpireSpan(hidden_size=12, max_span=60, ramp=3.0, alpha=0.1, positions=16, init=0.3),
}


def model_of(kind, pre_norm=False):
    """A small float64 model with spans that differ from memory to memory, layer to layer and head to head."""
    torch.manual_seed(0)
    config = TransformerConfig(vocabulary=11, hidden_size=12, heads=3, feedforward_size=20, pre_norm=pre_norm)
    model = Transformer(config, [MECHANISMS[kind]() for _ in range(2)]).double().eval()
    for layer in model.layers:
        if kind == "expire_span":
            torch.nn.init.normal_(layer.memory.weight)
        if kind == "adaptive_span":
            torch.nn.init.uniform_(layer.memory.ratio)
    return model


def run_in_blocks(model, tokens, block, reach=None):
    """Scores (B, T, classes), the last state, and the mean memory size over all queries."""
    state, scores, sizes = model.initial_state(len(tokens)), [], 0.0
    for start in range(0, tokens.shape[1], block):
        part = slice(start, start + block)
        out, state, figures = model(tokens[:, part], state, None if reach is None else reach[:, part])
        scores.append(out)
        sizes += figures["memory/size"].item() * out.shape[1]
    return torch.cat(scores, 1), state, sizes / tokens.shape[1]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(11, (3, 3 * 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reach():
    """Episodes of random lengths, begun anywhere in a block."""
    starts = torch.rand(3, 3 * 64, generator=torch.Generator().manual_seed(2)) < 0.02
    time = torch.arange(3 * 64).expand(3, -1)
    return time - (time * starts).cummax(1).values


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("kind", MECHANISMS)
def test_the_same_text_in_blocks_of_1_7_and_64_gives_the_same_outputs_and_memory_size(kind, pre_norm, tokens):
    model = model_of(kind, pre_norm)
    with torch.no_grad():
        whole, state, size = run_in_blocks(model, tokens, 64)
        for block in (1, 7):
            scores, other_state, other_size = run_in_blocks(model, tokens, block)
            assert_equal(f"scores in blocks of {block}", scores, whole)
            assert other_size == pytest.approx(size, rel=1e-6)
            for memory, other in zip(state["layers"], other_state["layers"], strict=True):
                assert torch.equal(memory.offsets, other.offsets)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_deleting_memories_with_m_0_changes_no_later_output(kind, tokens, monkeypatch):
    model = model_of(kind)
    with torch.no_grad():
        deleting, state, _ = run_in_blocks(model, tokens, 16)
        monkeypatch.setattr(transformer, "select", lambda memory, *_: memory)
        keeping, everything, _ = run_in_blocks(model, tokens, 16)
    assert_equal("scores", deleting, keeping, 1e-13)
    assert len(state["layers"][1].time) < len(everything["layers"][1].time)


def test_expire_span_keeps_different_numbers_per_sample_and_layer(tokens):
    with torch.no_grad():
        _, state, _ = run_in_blocks(model_of("expire_span"), tokens, 16)
    counts = torch.stack([memory.offsets.diff() for memory in state["layers"]])  # (layers, B)
    assert counts[0].unique().numel() > 1
    assert not torch.equal(counts[0], counts[1])


@pytest.mark.parametrize("kind", MECHANISMS)
def test_an_episode_sees_nothing_of_the_one_before(kind, tokens, reach):
    model = model_of(kind)
    first_of_last = int((tokens.shape[1] - 1 - reach[0, -1]).item())
    with torch.no_grad():
        whole, state, _ = run_in_blocks(model, tokens[:1], 16, reach[:1])
        alone, _, _ = run_in_blocks(model, tokens[:1, first_of_last:], 16, reach[:1, first_of_last:])
    if kind == "compressive":  # a pooled memory of an episode's very first states counts as of before it
        span = model.layers[0].memory.max_span
        whole, alone = whole[:, : first_of_last + span], alone[:, :span]
    assert_equal("scores", whole[:, first_of_last:], alone)
    assert all((memory.time >= first_of_last - 1).all() for memory in state["layers"])  # and they are deleted


def drawn_distances(reach_to=None):
    """Random memories, their spans, and what the block's queries see of them."""
    g = torch.Generator().manual_seed(4)
    samples, block, each = 3, 9, 50
    age = torch.randint(-block + 1, 40, (samples * each,), generator=g)
    born = torch.randint(1, 6, (samples * each,), generator=g)
    sample = torch.arange(samples).repeat_interleave(each)
    reach = None
    if reach_to is not None:
        begun = torch.randint(-40, block, (samples, 1), generator=g)
        steps = torch.arange(block) - begun
        reach = torch.where(steps >= 0, steps, steps + 60).clamp(max=reach_to)
    span = torch.rand(samples * each, 1, generator=g, dtype=torch.double) * 50 - 5
    span[::7] = span[::7].round()  # whole spans lie on the edges
    return age, born, sample, block, reach, span


@pytest.mark.parametrize("reach_to", [None, 25, 10**6], ids=str)
def test_memory_size_in_closed_form_is_the_count_of_m_above_0(reach_to):
    age, born, sample, block, reach, span = drawn_distances(reach_to)
    size = memory_size(span, 4.0, *reached(age, born, sample, block, reach), queries=3 * block)
    count = 0
    for i in range(len(age)):
        for t in range(block):
            distance = int(age[i]) + t
            within = reach is None or distance <= int(reach[sample[i], t])
            count += distance >= int(born[i]) and within and 1 + (span[i].item() - distance) / 4.0 > 0
    assert size.item() == pytest.approx(count / (3 * block))
    assert count > 0


@pytest.mark.parametrize("reach_to", [None, 25], ids=str)
def test_span_loss_in_closed_form_is_the_sum_over_the_ramp_with_its_gradient(reach_to):
    age, born, sample, block, reach, span = drawn_distances(reach_to)
    memory = ExpireSpan(hidden_size=1, max_span=50, ramp=4.0, alpha=0.3, positions=0)
    span.requires_grad_()
    loss = memory.loss(span, *reached(age, born, sample, block, reach), samples=3, block=block)
    total = torch.zeros((), dtype=torch.double)
    for i in range(len(age)):
        for t in range(block):
            distance = int(age[i]) + t
            within = reach is None or distance <= int(reach[sample[i], t])
            if distance >= int(born[i]) and within and 0 < 1 + (span[i].item() - distance) / 4.0 < 1:
                total = total + span[i, 0] - distance
    reference = 0.3 / (4.0 * block * 3) * total
    assert loss.item() == pytest.approx(reference.item())
    ours, theirs = (torch.autograd.grad(each, span)[0] for each in (loss, reference))
    assert_equal("gradient", ours, theirs)


def test_packed_rows_stay_with_their_sample_through_join_and_select():
    g = torch.Generator().manual_seed(0)
    first = select(dense(torch.randn(3, 5, 2, generator=g), torch.arange(5)), torch.rand(15, generator=g) < 0.5)
    second = dense(torch.randn(3, 2, 2, generator=g), torch.arange(5, 7))
    both = join(join(empty(3, 2, torch.zeros(1)), first), second)
    for sample in range(3):
        rows = slice(*both.offsets[sample : sample + 2].tolist())
        own = [memory.hidden[slice(*memory.offsets[sample : sample + 2].tolist())] for memory in (first, second)]
        assert torch.equal(both.hidden[rows], torch.cat(own))
        assert (both.time[rows].diff() > 0).all()


def test_spans_start_at_init_and_stay_float32_under_bfloat16():
    memory = ExpireSpan(hidden_size=8, max_span=65536, ramp=128, alpha=1e-6, positions=16, init=0.01)
    block = dense(torch.randn(2, 3, 8), torch.arange(3))
    with torch.autocast("cpu", torch.bfloat16):
        span = memory.span(block)
    assert span.dtype == torch.float32
    assert_equal("span", span, torch.full((6, 1), 655.36), 0.01)
    assert memory.bias.item() < 0


def test_random_drop_hides_far_memories_in_training_only_and_deletes_none(tokens):
    model = model_of("expire_span")
    memory = [ExpireSpan(12, 60, 3.0, 0.1, positions=16, random_drop=True) for _ in range(2)]
    dropping = Transformer(model.config, memory).double()
    dropping.load_state_dict(model.state_dict())
    with torch.no_grad():
        _, state, _ = run_in_blocks(model, tokens, 16)
        seen, kept, _ = model(tokens[:, :16], state)
        assert torch.equal(dropping.eval()(tokens[:, :16], state)[0], seen)
        dropping.train()
        outputs = [dropping(tokens[:, :16], state) for _ in range(8)]
    assert any(not torch.equal(scores, seen) for scores, _, _ in outputs)
    for _, carried, _ in outputs:
        assert torch.equal(carried["layers"][0].time, kept["layers"][0].time)  # deletion goes by the true span


def test_adaptive_span_z_stays_within_0_and_l():
    memory = AdaptiveSpan(heads=2, max_span=30, ramp=4.0, alpha=0.1)
    with torch.no_grad():
        memory.ratio.copy_(torch.tensor([-0.3, 1.7]))
    assert torch.equal(memory.span(None), torch.tensor([[1.0, 31.0]]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TransXL(0), "model.max_span must be at least 1"),
        (lambda: AdaptiveSpan(2, 10, 0, 0.1), "model.ramp must be positive"),
        (lambda: ExpireSpan(4, 10, 2, 0.1, positions=-1), "model.positions must not be negative"),
        (lambda: ExpireSpan(4, 10, 2, 0.1, positions=4, init=1.0), "model.init must lie between 0 and 1"),
        (lambda: Compressive(10, 0), "model.compressed and model.rate must be at least 1"),
        (lambda: TransformerConfig(5, 10, 3, 8), "transformer.heads must divide transformer.hidden_size"),
    ],
    ids=["max_span", "ramp", "positions", "init", "compressed", "heads"],
)
def test_impossible_sizes_are_refused_with_the_key_and_the_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_compressive_refuses_blocks_longer_than_its_memory():
    config = TransformerConfig(vocabulary=5, hidden_size=4, heads=1, feedforward_size=4)
    model = Transformer(config, [Compressive(max_span=8, compressed=2)])
    with pytest.raises(ValueError, match="too short for blocks of 12"):
        model(torch.zeros(1, 12, dtype=torch.long), model.initial_state(1))


def test_enwik8_model_of_the_paper_has_38_million_parameters():
    config = checked(composed("task=enwik8", "model=expire_span", "size=paper"))
    with torch.device("meta"):
        model = build_model(config, SimpleNamespace(vocabulary=256, classes=256), torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(38e6, rel=0.02)


def test_expire_span_adds_d_plus_1_parameters_a_layer():
    memory = ExpireSpan(64, max_span=100, ramp=16, alpha=1e-6, positions=16)
    assert sum(parameter.numel() for parameter in memory.parameters()) == 65
