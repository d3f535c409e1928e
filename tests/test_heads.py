"""Adaptive softmax and input against plain ones with the weights written out."""

from types import SimpleNamespace

import pytest
import torch
from tiny import composed
from tolerance import assert_equal

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.heads import AdaptiveSoftmax, Softmax
from expire_span.runner.build import build_model
from expire_span.runner.settings import checked


@pytest.fixture
def head():
    torch.manual_seed(0)
    return AdaptiveSoftmax(hidden_size=16, vocabulary=30, cutoffs=[6, 14]).double()


def written_out(head, hidden):
    """log p (n, vocabulary): frequent words and two clusters first, then the words within their cluster."""
    first = (hidden @ head.softmax.head.weight.T).log_softmax(-1)  # (n, 6 + 2)
    parts = [first[:, :6]]
    for number, (project, words) in enumerate(head.softmax.tail):
        within = (hidden @ project.weight.T @ words.weight.T).log_softmax(-1)
        parts.append(first[:, 6 + number, None] + within)
    return torch.cat(parts, -1)


def test_losses_are_those_of_all_probabilities_written_out(head):
    hidden, targets = torch.randn(50, 16, dtype=torch.double), torch.randint(30, (50,))
    log_p = written_out(head, hidden)
    assert_equal("sum of p", log_p.exp().sum(-1), torch.ones(50, dtype=torch.double))
    assert_equal("losses", head.losses(hidden, targets), -log_p.gather(1, targets[:, None])[:, 0])
    assert torch.equal(head.best(hidden.view(5, 10, 16)).flatten(), log_p.argmax(-1))


def test_input_embeddings_are_the_weights_of_the_output(head):
    embedded = head.embed(torch.arange(30).view(5, 6)).view(30, 16) / 4
    assert_equal("frequent words", embedded[:6], head.softmax.head.weight[:6])
    for number, (low, high) in enumerate([(6, 14), (14, 30)]):
        project, words = head.softmax.tail[number]
        assert_equal(f"cluster {number}", embedded[low:high], words.weight @ project.weight)


def test_a_transformer_with_cutoffs_trains_its_tied_weights_from_both_ends():
    config = TransformerConfig(vocabulary=30, hidden_size=16, heads=2, feedforward_size=16, cutoffs=[6, 14])
    model = Transformer(config, [TransXL(8)])
    tokens = torch.tensor([[1, 7, 20, 5]])
    out, _, _ = model(tokens, model.initial_state(1))
    assert out.shape == (1, 4, 16)
    model.output.losses(out[0, :3], tokens[0, 1:]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.output.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(model.state_dict())  # each weight is saved once


def test_wikitext_model_of_the_paper_has_140_million_parameters():
    config = checked(composed("task=wikitext103", "model=expire_span", "size=paper"))
    words = SimpleNamespace(vocabulary=267_735, classes=267_735)
    with torch.device("meta"):
        model = build_model(config, words, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(140e6, rel=0.02)


def test_plain_losses_are_cross_entropy_in_at_least_float32():
    head = Softmax(4, 3).bfloat16()
    scores, targets = head(torch.randn(5, 4).bfloat16()), torch.tensor([0, 1, 2, 0, 1])
    assert head.losses(scores, targets).dtype == torch.float32
    log_p = scores.float().log_softmax(-1)
    assert_equal("losses", head.losses(scores, targets), -log_p.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("cutoffs", [[0, 5], [9, 5], [5, 40], [2, 4, 6]], ids=str)
def test_cutoffs_that_cannot_be_are_refused(cutoffs):
    with pytest.raises(ValueError, match="transformer.cutoffs must rise"):
        AdaptiveSoftmax(hidden_size=16, vocabulary=30, cutoffs=cutoffs)


def test_bfloat16_goes_through_cutoffs():
    config = TransformerConfig(vocabulary=40, hidden_size=16, heads=2, feedforward_size=32, cutoffs=[10, 20])
    model = Transformer(config, [TransXL(8)])
    tokens = torch.arange(40).view(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _, _ = model(tokens, model.initial_state(2))
        loss = model.output.losses(hidden.flatten(0, 1), tokens.flatten()).mean()
    loss.backward()
    assert loss.isfinite()
