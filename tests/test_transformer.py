"""The model, whatever its memory mechanism."""

import pytest
import torch
from assertions import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

import expire_span.memory_attention as memory_attention
import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.checks import check_tokens

CONFIG = TransformerConfig(vocab_size=7, hidden_size=8, num_heads=2, feedforward_size=16)


def test_layers_of_one_model_may_have_different_mechanisms():
    mechanisms = [
        TransXL(16),
        AdaptiveSpan(2, 16, 4.0, 0.1, init_span_ratio=0.5),
        Compressive(16, 4),
        ExpireSpan(8, 64, 4.0, 0.1, num_positions=8, init_span_ratio=0.2),
    ]
    model = Transformer(CONFIG, mechanisms)
    state = model.initial_state(2)
    for tokens in torch.randint(7, (2, 96)).split(8, 1):
        logits, state, metrics = model(tokens, state)
        (logits.sum() + metrics["span_loss"]).backward()
    num_memories = [memory.offsets.diff().max().item() for memory in state["layers"]]
    assert num_memories[0] == 16
    assert num_memories[2] == 16 + 4
    assert metrics["memory/size_layer_0"] == 16


def test_the_carried_state_has_no_gradient_and_weights_get_theirs_through_it():
    model = Transformer(CONFIG, [ExpireSpan(8, 64, 8.0, 0.1, num_positions=8, init_span_ratio=0.3)])
    _, state, _ = model(torch.randint(7, (2, 32)), model.initial_state(2))
    assert not any(tensor.requires_grad for tensor in state["layers"][0][:4])
    logits, _, _ = model(torch.randint(7, (2, 1)), state)  # one query, which sees nothing but memories
    logits.square().sum().backward()
    assert model.layers[0].attention.key_proj.weight.grad.abs().sum() > 0
    assert model.mechanisms[0].bias.grad.abs() > 0


def test_the_embeddings_of_a_timesteps_fields_are_summed():
    model = Transformer(CONFIG, [TransXL(8)]).eval()
    fields = torch.randint(7, (2, 5, 3))
    logits, _, _ = model(fields, model.initial_state(2))
    one_field = Transformer(TransformerConfig(10, 8, 2, 16, num_classes=7), [TransXL(8)]).eval()
    summed = model.embedding(fields).sum(2).flatten(0, 1)  # one embedding per timestep
    weights = {**model.state_dict(), "embedding.weight": summed}
    one_field.load_state_dict(weights)
    assert_equal("logits", one_field(torch.arange(10).view(2, 5), one_field.initial_state(2))[0], logits)


def test_embeddings_start_with_the_standard_deviation_asked_for():
    for embedding_std, expected in ((None, 0.25), (1.0, 1.0)):
        config = TransformerConfig(4000, 16, 2, 16, embedding_std=embedding_std)
        model = Transformer(config, [TransXL(8)])
        assert model.embedding.weight.std().item() == pytest.approx(expected, rel=0.02)
    with pytest.raises(ValueError, match="embedding_std must be positive"):
        TransformerConfig(7, 8, 2, 16, embedding_std=0.0)


def test_a_token_is_attended_to_only_by_later_ones():
    model = Transformer(CONFIG, [TransXL(8)]).eval()
    tokens = torch.randint(7, (1, 6))
    model.layers[0].attention.query_proj.weight.data.zero_()  # so that the attention weights depend on the keys alone
    outputs = []
    model.layers[0].attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for change in (0, 1):
        tokens[0, 3] = (tokens[0, 3] + change) % 7
        model(tokens, model.initial_state(1))
    differs = (outputs[0] != outputs[1]).any(-1)[0].tolist()  # (T,)
    assert differs == [False, False, False, False, True, True]


def test_dropout_and_random_drop_are_for_training_only():
    config = TransformerConfig(7, 8, 2, 16, dropout=0.5, embedding_dropout=0.5)
    model = Transformer(config, [ExpireSpan(8, 64, 8.0, 0.1, num_positions=8, random_drop=True)]).eval()
    tokens = torch.randint(7, (2, 16))
    first, second = (model(tokens, model.initial_state(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(tokens, model.initial_state(2))[0] for _ in range(2))
    assert not torch.equal(first, second)


INPUTS = {  # of every kind of task, (B, T, ...)
    "tokens": torch.randint(7, (2, 16)),
    "fields": torch.randint(7, (2, 16, 3)),
    "observations": torch.randint(2, (2, 16, 7)).float(),
}


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("kind", [*INPUTS, "adaptive_input"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_memories_are_float32_under_bfloat16_autocast_whatever_the_input(kind, pre_norm, training):
    config = TransformerConfig(7, 8, 2, 16, pre_norm=pre_norm, cutoffs=[3] if kind == "adaptive_input" else None)
    expire_span = ExpireSpan(8, 64, 8.0, 0.1, num_positions=8)
    model = Transformer(config, [expire_span, Compressive(32, 4), AdaptiveSpan(2, 30, 4.0, 0.1)]).train(training)
    state = model.initial_state(2)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            _, state, metrics = model(INPUTS.get(kind, INPUTS["tokens"]), state)
    assert {memory.hidden.dtype for memory in state["layers"]} == {torch.float32}
    assert metrics["span_loss"].dtype == torch.float32


def test_an_observation_is_embedded_as_the_sum_of_its_words_also_under_autocast():
    model = Transformer(CONFIG, [TransXL(4)])
    words = INPUTS["observations"]
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.embed(words)
    assert_equal("embedding", embedded, (words[..., None] * model.embedding.weight).sum(2))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="mechanisms must be one per layer"):
        Transformer(CONFIG, [])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": torch.zeros(6, dtype=torch.long)}, r"tokens must be \(B, T\) or .* got \(6,\)"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.long)}, r"tokens must be .* not empty, got \(2, 0\)"),
        ({"tokens": torch.zeros(3, 6, dtype=torch.long)}, r"as many samples as the state, 2, got \(3, 6\)"),
        ({"tokens": torch.zeros(2, 6)}, r"floats must be \(B, T, vocab_size=7\), got \(2, 6\)"),
        ({"tokens": torch.zeros(2, 6, 8)}, r"floats must be \(B, T, vocab_size=7\), got \(2, 6, 8\)"),
        ({"tokens": torch.full((2, 6), 7)}, "tokens must lie between 0 and vocab_size - 1 = 6, got 7"),
        ({"tokens": torch.full((2, 6, 2), -1)}, "tokens must lie between 0 and vocab_size - 1 = 6, got -1"),
        ({"reach": torch.zeros(2, 5, dtype=torch.long)}, r"reach must be \(B, T\) = \(2, 6\), got \(2, 5\)"),
        ({"reach": torch.zeros(6, dtype=torch.long)}, r"reach must be \(B, T\) = \(2, 6\), got \(6,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("cutoffs", [None, [3]], ids=["linear", "adaptive softmax"])
def test_inputs_that_do_not_fit_the_model_or_the_state_are_refused(cutoffs, inputs, message):
    model = Transformer(TransformerConfig(7, 8, 2, 16, cutoffs=cutoffs), [TransXL(4)])
    inputs = {"tokens": torch.zeros(2, 6, dtype=torch.long)} | inputs
    with pytest.raises(ValueError, match=message):
        model(state=model.initial_state(2), **inputs)


def test_on_other_devices_than_a_cpu_no_check_of_the_tokens_waits_for_them():
    check_tokens(torch.zeros(2, 6, dtype=torch.long, device="meta"), batch_size=2, vocab_size=7)  # has no values


def test_the_state_of_a_model_with_other_layers_is_refused():
    model, other = (Transformer(CONFIG, [TransXL(4) for _ in range(layers)]) for layers in (1, 2))
    with pytest.raises(ValueError, match="state must be of a model of 1 layers, got 2"):
        model(torch.zeros(2, 6, dtype=torch.long), other.initial_state(2))


def outputs_and_gradients(tokens, **options):
    """The outputs and gradients of a model over four blocks, by name, and the most bytes that a block saved."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 8, "num_heads": 2, "feedforward_size": 64}
    mechanisms = [ExpireSpan(8, 64, 8.0, 0.1, num_positions=8, init_span_ratio=0.3) for _ in range(3)]
    model = Transformer(TransformerConfig(**sizes, dropout=0.2, **options), mechanisms).double()
    state, max_saved, tensors = model.initial_state(len(tokens)), 0, {}
    for index, block in enumerate(tokens.split(16, 1)):
        saved = {}

        def record(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            logits, state, metrics = model(block, state)
        (logits.square().mean() + metrics["span_loss"]).backward()
        max_saved = max(max_saved, sum(saved.values()))
        tensors[f"logits of block {index}"] = logits.detach()
    return tensors | {name: parameter.grad for name, parameter in model.named_parameters()}, max_saved


def test_activation_checkpointing_gives_the_same_gradients_and_saves_less():
    tokens = torch.randint(7, (2, 64), generator=torch.Generator().manual_seed(0))
    expected, saved = outputs_and_gradients(tokens)
    recomputed, saved_when_recomputing = outputs_and_gradients(tokens, activation_checkpointing=True)
    for name, tensor in expected.items():
        assert_equal(name, recomputed[name], tensor)
    assert saved_when_recomputing < saved / 2


def test_a_block_waits_for_the_device_only_once(monkeypatch):
    """That is to learn how many memories are kept. On CUDA each wait empties the queue of work."""
    monkeypatch.setattr(memory_attention, "packed_span_attention", lambda query, *rest, **mask_inputs: query)
    monkeypatch.setattr(transformer, "check_tokens", lambda *_: None)  # which looks at the ids on a CPU only
    waits = []

    class RecordWaits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if any(word in name for word in ("_local_scalar_dense", "nonzero.default", "masked_select")):
                waits.append(name)
            if "index.Tensor" in name and any(index is not None and index.dtype == torch.bool for index in args[1]):
                waits.append(name)
            return function(*args, **(kwargs or {}))

    expire_span, adaptive_span = ExpireSpan(8, 64, 8.0, 0.1, num_positions=8), AdaptiveSpan(2, 30, 4, 0.1)
    for mechanism in (expire_span, adaptive_span, Compressive(16, 4), TransXL(9)):
        model = Transformer(CONFIG, [mechanism] * 3)
        _, state, _ = model(torch.randint(7, (2, 16)), model.initial_state(2))
        with RecordWaits():
            model(torch.randint(7, (2, 16)), state, torch.arange(16).expand(2, -1))
        assert not waits
    # The one wait, `tolist` in Transformer.forward, is not seen by a dispatch mode.
