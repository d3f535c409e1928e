"""The stack, whatever its memories are."""

import pytest
import torch
from tolerance import assert_equal
from torch.utils._python_dispatch import TorchDispatchMode

import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL

CONFIG = TransformerConfig(vocabulary=7, hidden_size=8, heads=2, feedforward_size=16)


def test_layers_of_one_model_may_remember_in_different_ways():
    memory = [
        TransXL(16),
        AdaptiveSpan(2, 16, 4.0, 0.1, init=0.5),
        Compressive(16, 4),
        ExpireSpan(8, 64, 4.0, 0.1, positions=8, init=0.2),
    ]
    model = Transformer(CONFIG, memory)
    state = model.initial_state(2)
    for tokens in torch.randint(7, (2, 96)).split(8, 1):
        scores, state, figures = model(tokens, state)
        (scores.sum() + figures["span_loss"]).backward()
    kept = [memory.offsets.diff().max().item() for memory in state["layers"]]
    assert kept[0] == 16
    assert kept[2] == 16 + 4
    assert figures["memory/size_layer_0"] == 16


def test_a_carried_state_has_no_gradient_and_the_weights_get_theirs_through_it():
    model = Transformer(CONFIG, [ExpireSpan(8, 64, 8.0, 0.1, positions=8, init=0.3)])
    _, state, _ = model(torch.randint(7, (2, 32)), model.initial_state(2))
    assert not any(tensor.requires_grad for tensor in state["layers"][0][:4])
    scores, _, _ = model(torch.randint(7, (2, 1)), state)  # one query: all that it sees are memories
    scores.square().sum().backward()
    assert model.layers[0].attention.key.weight.grad.abs().sum() > 0
    assert model.layers[0].memory.bias.grad.abs() > 0


def test_the_fields_of_a_timestep_count_as_the_sum_of_their_embeddings():
    model = Transformer(CONFIG, [TransXL(8)]).eval()
    fields = torch.randint(7, (2, 5, 3))
    scores, _, _ = model(fields, model.initial_state(2))
    one_field = Transformer(TransformerConfig(10, 8, 2, 16, classes=7), [TransXL(8)]).eval()
    weights = {**model.state_dict(), "embedding.weight": model.embedding(fields).sum(2).flatten(0, 1)}  # one a timestep
    one_field.load_state_dict(weights)
    assert_equal("scores", one_field(torch.arange(10).view(2, 5), one_field.initial_state(2))[0], scores)


def test_embeddings_begin_with_the_deviation_that_is_asked_for():
    for asked, expected in ((None, 0.25), (1.0, 1.0)):
        config = TransformerConfig(4000, 16, 2, 16, embedding_init=asked)
        model = Transformer(config, [TransXL(8)])
        assert model.embedding.weight.std().item() == pytest.approx(expected, rel=0.02)
    with pytest.raises(ValueError, match="embedding_init must be positive"):
        TransformerConfig(7, 8, 2, 16, embedding_init=0.0)


def test_a_token_is_attended_to_by_neither_itself_nor_those_before_it():
    model = Transformer(CONFIG, [TransXL(8)]).eval()
    tokens = torch.randint(7, (1, 6))
    model.layers[0].attention.query.weight.data.zero_()  # so that what is attended to depends on the keys alone
    attended = []
    model.layers[0].attention.register_forward_hook(lambda module, inputs, out: attended.append(out))
    for change in (0, 1):
        tokens[0, 3] = (tokens[0, 3] + change) % 7
        model(tokens, model.initial_state(1))
    differs = (attended[0] != attended[1]).any(-1)[0].tolist()  # (T,)
    assert differs == [False, False, False, False, True, True]


def test_dropout_and_random_drop_are_for_training_alone():
    config = TransformerConfig(7, 8, 2, 16, dropout=0.5, embedding_dropout=0.5)
    model = Transformer(config, [ExpireSpan(8, 64, 8.0, 0.1, positions=8, random_drop=True)]).eval()
    tokens = torch.randint(7, (2, 16))
    one, two = (model(tokens, model.initial_state(2))[0] for _ in range(2))
    assert torch.equal(one, two)
    model.train()
    one, two = (model(tokens, model.initial_state(2))[0] for _ in range(2))
    assert not torch.equal(one, two)


def test_a_model_without_memories_is_refused():
    with pytest.raises(ValueError, match="one mechanism a layer"):
        Transformer(CONFIG, [])


def trained_on(tokens, **config):
    """The outputs and gradients of a model over four blocks, by name, and the most bytes that a block kept."""
    torch.manual_seed(0)
    config = TransformerConfig(vocabulary=7, hidden_size=8, heads=2, feedforward_size=64, dropout=0.2, **config)
    model = Transformer(config, [ExpireSpan(8, 64, 8.0, 0.1, positions=8, init=0.3) for _ in range(3)]).double()
    state, most, found = model.initial_state(len(tokens)), 0, {}
    for number, block in enumerate(tokens.split(16, 1)):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out, state, figures = model(block, state)
        (out.square().mean() + figures["span_loss"]).backward()
        most, found[f"scores of block {number}"] = max(most, sum(kept.values())), out.detach()
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}, most


def test_recomputing_layers_gives_the_same_gradients_and_keeps_less():
    tokens = torch.randint(7, (2, 64), generator=torch.Generator().manual_seed(0))
    plain, kept = trained_on(tokens)
    again, kept_again = trained_on(tokens, recompute=True)
    for name, reference in plain.items():
        assert_equal(name, again[name], reference)
    assert kept_again < kept / 2


def test_a_block_waits_for_the_device_once(monkeypatch):
    """To learn how many memories are left. On CUDA each such wait would empty the queue of work."""
    monkeypatch.setattr(transformer, "packed_span_attention", lambda query, *rest, **fading: query)
    waits = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if any(word in name for word in ("_local_scalar_dense", "nonzero.default", "masked_select")):
                waits.append(name)
            if "index.Tensor" in name and any(each is not None and each.dtype == torch.bool for each in args[1]):
                waits.append(name)
            return function(*args, **(kwargs or {}))

    expire, adaptive = ExpireSpan(8, 64, 8.0, 0.1, positions=8), AdaptiveSpan(2, 30, 4, 0.1)
    for memory in (expire, adaptive, Compressive(16, 4), TransXL(9)):
        model = Transformer(CONFIG, [memory] * 3)
        _, state, _ = model(torch.randint(7, (2, 16)), model.initial_state(2))
        with Listen():
            model(torch.randint(7, (2, 16)), state, torch.arange(16).expand(2, -1))
        assert not waits
    # `tolist` of the three numbers is not seen by a dispatch mode: it is the one wait, in Transformer.forward
