"""A cap on the spans in evaluation (figure 10): longer spans are shortened, the others stay as they are."""

import pytest
import torch
from assertions import assert_equal
from naive_attention import naive_packed_attention
from small_models import MECHANISMS, run_in_blocks, small_model
from tiny_config import tiny_config

import expire_span.memory_attention as memory_attention
from expire_span import ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.runner.run_folder.files import read_metrics
from expire_span.runner.train import train

CONFIG = TransformerConfig(vocab_size=11, hidden_size=12, num_heads=3, feedforward_size=20)
TOKENS = torch.randint(11, (2, 96), generator=torch.Generator().manual_seed(1))


def clip_spans_by_hand(monkeypatch, model, cap):
    for mechanism in model.mechanisms:
        compute_span = mechanism.span
        monkeypatch.setattr(
            mechanism, "span", lambda memory, compute_span=compute_span: compute_span(memory).clamp(max=cap)
        )


@pytest.mark.parametrize("cap", [1, 11, 30, 75])
@pytest.mark.parametrize("kind", MECHANISMS)
@torch.no_grad()
def test_a_span_cap_gives_what_spans_clipped_by_hand_give(kind, cap, monkeypatch):
    model = small_model(kind)
    capped, capped_state, capped_size = run_in_blocks(model, TOKENS, 16, span_cap=cap)
    clip_spans_by_hand(monkeypatch, model, cap)
    clipped, clipped_state, clipped_size = run_in_blocks(model, TOKENS, 16)
    assert torch.equal(capped, clipped)
    assert capped_size == clipped_size
    for memory, expected in zip(capped_state["layers"], clipped_state["layers"], strict=True):
        assert torch.equal(memory.time, expected.time)
        assert (capped_state["step"] - memory.time < cap + model.mechanisms[0].ramp).all()


@pytest.mark.parametrize("kind", ["trans_xl", "adaptive_span", "expire_span"])
@torch.no_grad()
def test_a_span_cap_equals_loops_over_memories_with_the_smaller_of_span_and_cap(kind, monkeypatch):
    model, tokens = small_model(kind), TOKENS[:1, :24]
    capped, _, _ = run_in_blocks(model, tokens, 8, span_cap=5)
    clip_spans_by_hand(monkeypatch, model, 5)
    monkeypatch.setattr(memory_attention, "packed_span_attention", naive_packed_attention())
    expected, _, _ = run_in_blocks(model, tokens, 8)
    assert_equal("logits", capped, expected)


@torch.no_grad()
def test_a_span_cap_leaves_shorter_spans_as_they_are_where_another_max_span_rescales_them():
    def mean_span(max_span, span_cap=None):
        torch.manual_seed(0)
        model = Transformer(CONFIG, [ExpireSpan(12, max_span, 3.0, 0.1, num_positions=16, init_span_ratio=0.3)])
        torch.nn.init.normal_(model.mechanisms[0].weight)
        return model(TOKENS, model.initial_state(2), span_cap=span_cap)[2]["memory/span"].item()

    assert mean_span(60, span_cap=60) == mean_span(60)
    assert mean_span(30) == pytest.approx(mean_span(60) / 2)
    assert mean_span(30) < mean_span(60, span_cap=30) < mean_span(60)


@torch.no_grad()
def test_a_capped_transformer_xl_is_one_with_a_shorter_memory():
    model = small_model("trans_xl")
    shorter = Transformer(model.config, [TransXL(9, num_positions=40) for _ in range(2)]).double().eval()
    shorter.load_state_dict(model.state_dict())
    assert torch.equal(run_in_blocks(model, TOKENS, 16, span_cap=9)[0], run_in_blocks(shorter, TOKENS, 16)[0])


@torch.no_grad()
def test_spans_are_cached_without_the_cap():
    model = small_model("trans_xl")
    _, state, _ = run_in_blocks(model, TOKENS[:, :16], 16, span_cap=30)  # no memory is so old yet
    _, expected_state, _ = run_in_blocks(model, TOKENS[:, :16], 16)
    assert torch.equal(model(TOKENS[:, 16:64], state)[0], model(TOKENS[:, 16:64], expected_state)[0])


@pytest.mark.parametrize("task", ["copy", "corridor"])
def test_the_key_caps_every_evaluation_of_a_run_and_nothing_of_its_training(task, tmp_path):
    rows = {}
    for cap in ("null", "3"):
        folder = tmp_path / cap
        folder.mkdir()
        overrides = ["model=trans_xl", "eval.interval=2", "eval.splits=[test]", f"eval.span_cap={cap}"]
        train(tiny_config(*overrides, task=task), folder)
        rows[cap] = read_metrics(folder / "metrics.jsonl")
    for free, capped in zip(rows["null"], rows["3"], strict=True):
        for name in ("memory/size", "train/loss", "rl/episode_return"):
            assert capped.get(name) == free.get(name)
        for name in {"valid/memory/size", "test/memory/size"} & set(free):
            assert capped[name] <= 3 < free[name]
    assert {"train/loss", "valid/memory/size", "test/memory/size"} <= {name for row in rows["3"] for name in row}
