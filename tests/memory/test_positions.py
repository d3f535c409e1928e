"""The table of relative positions costs what the memories that are kept need, whatever the longest span."""

import pytest
import torch
from assertions import assert_equal
from small_models import MECHANISMS, small_model

import expire_span.memory_attention as memory_attention
from expire_span import AdaptiveSpan, Transformer, TransformerConfig, TransXL
from expire_span.kernels import cpp_backend
from expire_span.memory import Memory
from expire_span.transformer import TransformerBlock

TOKENS = torch.randint(11, (2, 160), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def table_sizes(monkeypatch):
    """The number of rows of the position table in each call of the attention."""
    sizes, attend = [], memory_attention.packed_span_attention

    def record(*args, position, **kwargs):
        sizes.append(len(position))
        return attend(*args, position=position, **kwargs)

    monkeypatch.setattr(memory_attention, "packed_span_attention", record)
    return sizes


def use_whole_table(monkeypatch):
    monkeypatch.setattr(TransformerBlock, "num_positions", lambda self, *_: self.mechanism.num_positions)


@pytest.mark.parametrize("max_span", [1000, 100_000])
def test_each_layer_uses_the_positions_up_to_its_oldest_memory(max_span, table_sizes):
    config = TransformerConfig(vocab_size=11, hidden_size=12, num_heads=3, feedforward_size=20)
    spans = (29.5, 199.5)
    model = Transformer(config, [AdaptiveSpan(3, max_span, 4.0, 0.1, init_span_ratio=n / max_span) for n in spans])
    state = model.initial_state(2)
    for tokens in torch.randint(11, (2, 320)).split(16, 1):
        _, state, _ = model(tokens, state)
    # Their oldest memories are 34 and 204 timesteps old, and 15 more at the last query; 64 is the next multiple.
    assert table_sizes[-2:] == [64, 256]
    assert [memory.max_age for memory in state["layers"]] == [34, 204]


def test_a_state_without_its_largest_ages_as_checkpoints_have_it_gives_the_same_bits(table_sizes):
    model = small_model("adaptive_span")
    state = model.initial_state(2)
    for tokens in TOKENS.split(16, 1):
        saved = {"step": state["step"], "layers": [Memory(*memory[:4]) for memory in state["layers"]]}
        logits, next_state, _ = model(tokens, state)
        restored, restored_state, _ = model(tokens, saved)
        assert torch.equal(restored, logits)
        assert table_sizes[-2:] == table_sizes[-4:-2]
        assert [m.max_age for m in restored_state["layers"]] == [m.max_age for m in next_state["layers"]]
        state = next_state


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("kind", [*MECHANISMS, "long_trans_xl"])
def test_outputs_and_gradients_are_those_of_the_whole_table(kind, backend, monkeypatch):
    if backend == "cpp" and not cpp_backend.available():
        pytest.skip("no C++ compiler")

    def outputs_and_gradients():
        model = small_model("trans_xl" if kind == "long_trans_xl" else kind)
        if kind == "long_trans_xl":  # its table is cut while its memory fills
            torch.manual_seed(0)
            model = Transformer(model.config, [TransXL(150) for _ in range(2)]).double()
        for layer in model.layers:
            layer.attention.backend = backend
        state, outputs = model.initial_state(2), []
        for tokens in TOKENS.split(16, 1):
            logits, state, metrics = model(tokens, state)
            (logits.square().mean() + metrics["span_loss"]).backward()
            outputs.append(logits.detach())
        return {"logits": torch.cat(outputs, 1)} | {name: p.grad for name, p in model.named_parameters()}

    cut = outputs_and_gradients()
    use_whole_table(monkeypatch)
    for name, expected in outputs_and_gradients().items():
        if expected is not None:
            assert_equal(name, cut[name], expected, 1e-12 if name == "logits" else 1e-9)


def test_a_mechanism_whose_distances_share_rows_keeps_its_whole_table(table_sizes):
    model = small_model("compressive")
    model(TOKENS[:, :16], model.initial_state(2))
    assert set(table_sizes) == {model.mechanisms[0].num_positions}
