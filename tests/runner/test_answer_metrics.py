"""Scoring of lines, wherever blocks end; and predictions only where a metric needs them."""

from types import SimpleNamespace

import pytest
import torch

from expire_span import Transformer, TransformerConfig, TransXL
from expire_span.output_heads import AdaptiveSoftmax
from expire_span.runner.logging.answer_metrics import AnswerMetrics, check_metrics, loss_to_metric, score_predictions
from expire_span.runner.objectives.prediction import count_targets, loss_and_predictions
from expire_span.tasks.base import Batch

#           line 0        line 1  line 2: unfinished at the end of the text
LINE_ID = [-1, 0, 0, 0, -1, 1, 1, 2, 2, -1, 3, 3, 3, -1, 4, 4]
CORRECT = [0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1]
DISTANCE = [0, 5, 5, 5, 0, 9, 9, 40, 40, 0, 40, 40, 40, 0, 3, 3]


def batches(block_size):
    """Predictions and batches of two streams, the first predicted as CORRECT says, the second perfectly."""
    targets = torch.randint(7, (2, len(LINE_ID)), generator=torch.Generator().manual_seed(0))
    correct = torch.tensor([CORRECT, [1] * len(LINE_ID)])
    predictions = torch.where(correct.bool(), targets, (targets + 1) % 7)
    distance, line_id = (torch.tensor([values, values]) for values in (DISTANCE, LINE_ID))
    for start in range(0, len(LINE_ID), block_size):
        block = (slice(None), slice(start, start + block_size))
        yield predictions[block], Batch(targets[block], targets[block], None, distance[block], line_id[block])


@pytest.mark.parametrize("block_size", [16, 8, 7, 5, 4, 3, 2, 1])
def test_a_line_counts_once_and_as_a_whole_wherever_blocks_end(block_size):
    answers = AnswerMetrics("line", torch.device("cpu"))
    for predictions, batch in batches(block_size):
        answers.add(torch.zeros(0), predictions, batch)
    metrics = answers.metrics("accuracy", 1.0)
    assert answers.counts.tolist() == [32, 8, 2 + 4], "the last line has not ended"
    assert metrics["accuracy"] == 6 / 8
    assert metrics["accuracy_distance_4_8"] == 1.0
    assert metrics["accuracy_distance_8_16"] == 0.5
    assert metrics["accuracy_distance_32_64"] == 0.75
    assert metrics["word_accuracy"] == (10 + 12) / 24


def test_in_training_a_line_is_scored_where_it_ends_by_its_words_in_the_block():
    (first_predictions, first), (second_predictions, second) = batches(8)
    correct, scored, _ = score_predictions(first_predictions, first, "line")
    assert scored[0].nonzero().flatten().tolist() == [3, 6], "the last word's line may go on"
    assert correct[0, [3, 6]].tolist() == [True, False]
    correct, scored, distance = score_predictions(second_predictions, second, "line")
    assert scored[0].nonzero().flatten().tolist() == [0, 4]
    assert correct[0, [0, 4]].tolist() == [True, False]
    assert distance[0, [0, 4]].tolist() == [40, 40]


def test_beyond_reach_is_the_share_of_answers_farther_back_than_the_model_reaches():
    for max_reach, share in ((40, 0.0), (39, 0.5), (7, 0.75)):
        answers = AnswerMetrics("line", torch.device("cpu"), max_reach)
        for predictions, batch in batches(5):
            answers.add(torch.zeros(0), predictions, batch)
        assert answers.metrics("accuracy", 1.0)["beyond_reach"] == share


def test_word_accuracy_is_given_for_lines_only():
    answers = AnswerMetrics("token", torch.device("cpu"))
    for predictions, batch in batches(8):
        answers.add(torch.zeros(0), predictions, batch)
    assert "word_accuracy" not in answers.metrics("accuracy", 1.0)


def test_the_correct_lines_are_those_that_the_model_itself_writes():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=30, hidden_size=16, num_heads=2, feedforward_size=32)
    model = Transformer(config, [TransXL(16) for _ in range(2)]).double().eval()
    text, state = [3, 1, 4, 1, 5], model.initial_state(1)
    for place in range(16):  # after the first 5 words the model writes, always the most likely one
        logits, state, _ = model(torch.tensor([[text[place]]]), state, None)
        if place + 1 == len(text):
            text.append(int(logits.argmax()))
    line_id = torch.tensor([[-1] * 4 + [0] * 8 + [-1] * 4])  # of the targets: 8 words that the model wrote
    for change, accuracy in ((0, 1.0), (1, 0.0)):
        text[9] = (text[9] + change) % 30
        answers, state = AnswerMetrics("line", torch.device("cpu")), model.initial_state(1)
        tokens, targets = torch.tensor([text[:16]]), torch.tensor([text[1:17]])
        for start in range(0, 16, 6):
            block = (slice(None), slice(start, start + 6))
            batch = Batch(tokens[block], targets[block], None, torch.ones_like(line_id[block]), line_id[block])
            logits, state, _ = model(batch.tokens, state, None)
            answers.add(*loss_and_predictions(model, logits, batch, count_targets(batch), "accuracy"), batch)
        assert answers.metrics("accuracy", 1.0)["accuracy"] == accuracy


def test_predictions_over_a_large_vocabulary_are_computed_only_for_metrics_of_accuracy(monkeypatch):
    head = AdaptiveSoftmax(16, 40, [10, 20])
    hidden, targets = torch.randn(2, 3, 16), torch.randint(40, (2, 3))
    model, batch = SimpleNamespace(output_head=head), Batch(targets, targets)
    losses, predictions = loss_and_predictions(model, hidden, batch, 6, "error")
    assert torch.equal(predictions, head.log_probs(hidden).argmax(-1))
    monkeypatch.setattr(head, "predict", None)
    same_losses, no_predictions = loss_and_predictions(model, hidden, batch, 6, "ppl")
    assert torch.equal(same_losses, losses)
    assert no_predictions is None
    answers = AnswerMetrics("token", torch.device("cpu"))
    answers.add(same_losses, no_predictions, batch)
    assert answers.metrics("ppl", 1.0)["ppl"] == pytest.approx(losses.mean().exp().item())


def test_a_metric_that_does_not_exist_is_refused_instead_of_being_taken_for_the_error_rate():
    for refuse in (lambda: loss_to_metric("acuracy", 1.0, 0.5), lambda: check_metrics(["bpb", "acuracy"])):
        with pytest.raises(ValueError, match="must be one of bpb, bpc, ppl, accuracy, error, got 'acuracy'"):
            refuse()
