"""Adaptive softmax and input embeddings equal plain ones with all weights written out."""

from types import SimpleNamespace

import pytest
import torch
from assertions import assert_equal
from tiny_config import compose_config

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.output_heads import AdaptiveSoftmax, LinearHead
from expire_span.runner.build import build_model
from expire_span.runner.config.schema import validate


@pytest.fixture
def head():
    torch.manual_seed(0)
    return AdaptiveSoftmax(hidden_size=16, vocab_size=30, cutoffs=[6, 14]).double()


def all_log_probs(head, hidden):
    """Log-probabilities (n, vocab_size): of the frequent words and two clusters, then of the words in each cluster."""
    first = (hidden @ head.softmax.head.weight.T).log_softmax(-1)  # (n, 6 + 2)
    parts = [first[:, :6]]
    for cluster, (projection, words) in enumerate(head.softmax.tail):
        within_cluster = (hidden @ projection.weight.T @ words.weight.T).log_softmax(-1)
        parts.append(first[:, 6 + cluster, None] + within_cluster)
    return torch.cat(parts, -1)


def test_losses_equal_those_of_all_probabilities_written_out(head):
    hidden, targets = torch.randn(50, 16, dtype=torch.double), torch.randint(30, (50,))
    log_probs = all_log_probs(head, hidden)
    assert_equal("sum of probabilities", log_probs.exp().sum(-1), torch.ones(50, dtype=torch.double))
    assert_equal("losses", head.token_losses(hidden, targets), -log_probs.gather(1, targets[:, None])[:, 0])
    assert torch.equal(head.predict(hidden.view(5, 10, 16)).flatten(), log_probs.argmax(-1))


def test_input_embeddings_are_the_weights_of_the_output_head(head):
    embedded = head.embed(torch.arange(30).view(5, 6)).view(30, 16) / 4
    assert_equal("frequent words", embedded[:6], head.softmax.head.weight[:6])
    for cluster, (low, high) in enumerate([(6, 14), (14, 30)]):
        projection, words = head.softmax.tail[cluster]
        assert_equal(f"cluster {cluster}", embedded[low:high], words.weight @ projection.weight)


def test_a_transformer_with_cutoffs_trains_all_its_tied_weights_and_saves_each_once():
    config = TransformerConfig(vocab_size=30, hidden_size=16, num_heads=2, feedforward_size=16, cutoffs=[6, 14])
    model = Transformer(config, [TransXL(8)])
    tokens = torch.tensor([[1, 7, 20, 5]])
    out, _, _ = model(tokens, model.initial_state(1))
    assert out.shape == (1, 4, 16)
    model.output_head.token_losses(out[0, :3], tokens[0, 1:]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.output_head.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(model.state_dict())


def test_the_papers_wikitext_model_has_140_million_parameters():
    config = validate(compose_config("task=wikitext103", "model=expire_span", "size=paper"))
    words = SimpleNamespace(vocab_size=267_735, num_classes=267_735)
    with torch.device("meta"):
        model = build_model(config, words, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(140e6, rel=0.02)


def test_losses_of_the_linear_head_are_cross_entropy_in_float32_even_for_bfloat16_logits():
    head = LinearHead(4, 3).bfloat16()
    logits, targets = head(torch.randn(5, 4).bfloat16()), torch.tensor([0, 1, 2, 0, 1])
    assert head.token_losses(logits, targets).dtype == torch.float32
    log_probs = logits.float().log_softmax(-1)
    assert_equal("losses", head.token_losses(logits, targets), -log_probs.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("cutoffs", [[0, 5], [9, 5], [5, 5], [5, 40], [2.5, 9], [2, 4, 6]], ids=str)
def test_impossible_cutoffs_are_refused(cutoffs):
    with pytest.raises(ValueError, match="cutoffs must"):
        AdaptiveSoftmax(hidden_size=16, vocab_size=30, cutoffs=cutoffs)


def test_a_transformer_with_cutoffs_trains_under_bfloat16():
    config = TransformerConfig(vocab_size=40, hidden_size=16, num_heads=2, feedforward_size=32, cutoffs=[10, 20])
    model = Transformer(config, [TransXL(8)])
    tokens = torch.arange(40).view(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _, _ = model(tokens, model.initial_state(2))
        loss = model.output_head.token_losses(hidden.flatten(0, 1), tokens.flatten()).mean()
    loss.backward()
    assert loss.isfinite()
