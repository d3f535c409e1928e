"""Answers that are lines of several words, wherever blocks end; and no answers where none are needed."""

from types import SimpleNamespace

import pytest
import torch

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.heads import AdaptiveSoftmax
from expire_span.runner.measures import Answers, judged
from expire_span.runner.prediction import answered, asked_in
from expire_span.tasks.stream import Batch

#        line 0        line 1  line 2: it goes on when the text ends
LINE = [-1, 0, 0, 0, -1, 1, 1, 2, 2, -1, 3, 3, 3, -1, 4, 4]
RIGHT = [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1]
DISTANCE = [0, 5, 5, 5, 0, 9, 9, 40, 40, 0, 40, 40, 40, 0, 3, 3]


def batches(block):
    """The text above as one stream, and the same with every word right as another; what is answered to be right so."""
    targets = torch.randint(7, (2, len(LINE)), generator=torch.Generator().manual_seed(0))
    right = torch.tensor([RIGHT, [1] * len(LINE)])
    best = torch.where(right.bool(), targets, (targets + 1) % 7)
    distance, line = (torch.tensor([each, each]) for each in (DISTANCE, LINE))
    for start in range(0, len(LINE), block):
        part = slice(start, start + block)
        yield best[:, part], Batch(targets[:, part], targets[:, part], None, distance[:, part], line[:, part])


@pytest.mark.parametrize("block", [16, 8, 7, 5, 4, 3, 2, 1])
def test_a_line_counts_once_and_as_a_whole_wherever_blocks_end(block):
    answers = Answers("line", torch.device("cpu"))
    for best, batch in batches(block):
        answers.add(torch.zeros(0), best, batch)
    figures = answers.figures("accuracy", 1.0)
    assert answers.counts.tolist() == [32, 8, 2 + 4], "the last line has not ended"
    assert figures["accuracy"] == 6 / 8
    assert figures["accuracy_distance_4_8"] == 1.0
    assert figures["accuracy_distance_8_16"] == 0.5
    assert figures["accuracy_distance_32_64"] == 0.75
    assert figures["word_accuracy"] == (10 + 12) / 24


def test_in_training_a_line_is_judged_where_it_ends_by_its_words_in_the_block():
    (_, first), (_, second) = batches(8)
    best = [best for best, _ in batches(8)]
    right, ended, _ = judged(best[0], first, "line")
    assert ended[0].nonzero().flatten().tolist() == [3, 6], "the last word's line may go on"
    assert right[0, [3, 6]].tolist() == [True, False]
    right, ended, distance = judged(best[1], second, "line")
    assert ended[0].nonzero().flatten().tolist() == [0, 4]
    assert right[0, [0, 4]].tolist() == [True, False]
    assert distance[0, [0, 4]].tolist() == [40, 40]


def test_word_accuracy_is_given_for_lines_only():
    answers = Answers("token", torch.device("cpu"))
    for best, batch in batches(8):
        answers.add(torch.zeros(0), best, batch)
    assert "word_accuracy" not in answers.figures("accuracy", 1.0)


def test_right_are_the_lines_that_the_model_itself_writes():
    torch.manual_seed(0)
    config = TransformerConfig(vocabulary=30, hidden_size=16, heads=2, feedforward_size=32)
    model = Transformer(config, [TransXL(16) for _ in range(2)]).double().eval()
    text, state = [3, 1, 4, 1, 5], model.initial_state(1)
    for place in range(16):  # the first 5 are given, the others it writes, always the likeliest
        scores, state, _ = model(torch.tensor([[text[place]]]), state, None)
        if place + 1 == len(text):
            text.append(int(scores.argmax()))
    line = torch.tensor([[-1] * 4 + [0] * 8 + [-1] * 4])  # of the targets: 8 words that it wrote
    for change, accuracy in ((0, 1.0), (1, 0.0)):
        text[9] = (text[9] + change) % 30
        answers, state = Answers("line", torch.device("cpu")), model.initial_state(1)
        tokens, targets = torch.tensor([text[:16]]), torch.tensor([text[1:17]])
        for start in range(0, 16, 6):
            part = slice(start, start + 6)
            batch = Batch(tokens[:, part], targets[:, part], None, torch.ones_like(line[:, part]), line[:, part])
            scores, state, _ = model(batch.tokens, state, None)
            answers.add(*answered(model, scores, batch, asked_in(batch), "accuracy"), batch)
        assert answers.figures("accuracy", 1.0)["accuracy"] == accuracy


def test_the_likeliest_word_of_all_is_looked_for_only_where_right_answers_count(monkeypatch):
    head = AdaptiveSoftmax(16, 40, [10, 20])
    hidden, targets = torch.randn(2, 3, 16), torch.randint(40, (2, 3))
    model, batch = SimpleNamespace(output=head), Batch(targets, targets)
    losses, best = answered(model, hidden, batch, 6, "error")
    assert torch.equal(best, head.log_p(hidden).argmax(-1))
    monkeypatch.setattr(head, "best", None)
    same, none = answered(model, hidden, batch, 6, "ppl")
    assert torch.equal(same, losses)
    assert none is None
    answers = Answers("token", torch.device("cpu"))
    answers.add(same, none, batch)
    assert answers.figures("ppl", 1.0)["ppl"] == pytest.approx(losses.mean().exp().item())
