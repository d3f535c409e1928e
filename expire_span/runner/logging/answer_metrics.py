"""How well targets are predicted: loss, accuracy by the task's way of scoring, and accuracy by distance."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from expire_span.tasks.base import IGNORE_INDEX, METRICS, Batch

from .. import ranks
from .metrics import Metrics

ACCURACY_METRICS = ("accuracy", "error")  # those that need predictions
NUM_BINS = 40  # distances are binned by powers of two: d falls into bin floor(log2 d)


def check_metrics(task_metrics: Iterable[str]) -> None:
    """Raises ValueError for a metric that is not known."""
    for name in task_metrics:
        if name not in METRICS:
            raise ValueError(f"the task's metric must be one of {', '.join(METRICS)}, got {name!r}")


def loss_to_metric(metric: str, loss: float, accuracy: float, bytes_per_token: float = 1.0) -> float:
    """A task's metric from the loss (nats per target) and the accuracy. Raises ValueError for an unknown metric."""
    check_metrics([metric])
    if metric == "bpb":
        return loss / math.log(2) / bytes_per_token
    if metric == "bpc":  # for tasks whose tokens are characters
        return loss / math.log(2)
    if metric == "ppl":
        return math.exp(min(loss, 700.0))
    return accuracy if metric == "accuracy" else 1 - accuracy


def score_predictions(predictions: Tensor, batch: Batch, scoring: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which answers are correct, which count, and how far back each answer lies, in timesteps.

    Args:
        predictions: (B, T), the predicted tokens.
        scoring: "token": every target is an answer; "sequence": the targets of a stream's block are one answer, correct
            if all of them are; "line": a line is scored where it ends, by those of its words that are in the block.

    Returns:
        correct, scored and distance: (B, T), or (B,) for "sequence".
    """
    has_target = batch.targets != IGNORE_INDEX  # (B, T)
    correct = predictions == batch.targets  # (B, T)
    if scoring == "token":
        return correct, has_target, batch.answer_distance
    if scoring == "line":
        assert batch.answer_id is not None
        return *score_lines(correct, batch.answer_id), batch.answer_distance
    distance = batch.answer_distance
    distance = None if distance is None else distance.masked_fill(~has_target, 0).amax(1)  # (B,)
    return (correct | ~has_target).all(1) & has_target.any(1), has_target.any(1), distance


def score_lines(correct: Tensor, line_id: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each line is correct up to and including each word, and at which words a line ends: both (B, T).

    A greedy model writes a line exactly if each word is its most likely one after the true words before it, so
    teacher-forced predictions tell which lines it would write. The last line of the block may go on after it.

    Args:
        correct: (B, T), whether each word is predicted correctly.
        line_id: (B, T), the line that each word belongs to; -1 for none.
    """
    changes = line_id[:, 1:] != line_id[:, :-1]  # (B, T - 1)
    begins, ends = pad(changes, (1, 0), value=True), pad(changes, (0, 1), value=False)  # (B, T)
    wrong = (~correct).long()
    wrong_so_far = wrong.cumsum(1)
    wrong_before_line = (wrong_so_far - wrong).where(begins, 0).cummax(1).values
    return wrong_so_far == wrong_before_line, ends & (line_id >= 0)


class AccuracyByDistance:
    """Counts answers and correct answers by how far back the answer lies, in bins between powers of two.

    Args:
        max_reach: timesteps; answers farther back are out of the model's reach, but for what its layers pass on.
    """

    def __init__(self, device: torch.device, max_reach: float):
        self.counts = torch.zeros(2, NUM_BINS, dtype=torch.long, device=device)  # answers, correct answers
        self.max_reach = max_reach
        self.num_beyond = torch.zeros((), dtype=torch.long, device=device)

    def add(self, correct: Tensor, scored: Tensor, distance: Tensor) -> None:
        """All three of one shape; distance in timesteps."""
        bins = distance.clamp(min=1).float().log2().long()
        for row, mask in enumerate((scored, scored & correct)):
            self.counts[row] += torch.bincount(bins[mask], minlength=NUM_BINS)
        self.num_beyond += (scored & (distance > self.max_reach)).sum()

    def sum_over_ranks(self) -> None:
        """Count the answers of all ranks."""
        self.counts, self.num_beyond = ranks.sum_tensor(self.counts), ranks.sum_tensor(self.num_beyond)

    def beyond_reach(self) -> Metrics:
        """Share of the answers that are out of reach, as beyond_reach; nothing without answers."""
        answers = int(self.counts[0].sum())
        return {"beyond_reach": self.num_beyond.item() / answers} if answers else {}

    def accuracies(self) -> Metrics:
        """Accuracy of each bin that has answers, as distance_LOW_HIGH."""
        return {
            f"distance_{2**power if power else 0}_{2 ** (power + 1)}": correct / answers
            for power, (answers, correct) in enumerate(self.counts.T.tolist())
            if answers
        }


class AnswerMetrics:
    """Accumulates loss and accuracy over the blocks of an evaluation.

    A line may begin in one block and end in a later one. A line that is unfinished at the end of the split is not
    counted. `max_reach` is that of the model, see `AccuracyByDistance`.
    """

    def __init__(self, scoring: str, device: torch.device, max_reach: float = math.inf):
        self.scoring = scoring
        self.nats = torch.zeros((), dtype=torch.float if device.type == "mps" else torch.double, device=device)
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # targets, answers, correct answers
        self.words = torch.zeros(2, dtype=torch.long, device=device)  # of lines: words, words predicted correctly
        self.by_distance = AccuracyByDistance(device, max_reach)
        self.last_word: tuple[Tensor, ...] | None = None  # of the previous block: correct so far, line id, distance

    def add(self, losses: Tensor, predictions: Tensor | None, batch: Batch) -> None:
        """losses (num_targets,) in nats; predictions (B, T), or None if the task's metric does not need them."""
        self.nats += losses.sum()
        self.counts[0] += (batch.targets != IGNORE_INDEX).sum()
        if predictions is None:
            return
        distance: Tensor | None
        if self.scoring == "line":
            correct, scored, distance = self.score_lines_across_blocks(predictions, batch)
        else:
            correct, scored, distance = score_predictions(predictions, batch, self.scoring)
        self.counts[1:] += torch.stack([scored.sum(), (correct & scored).sum()])
        if distance is not None:
            self.by_distance.add(correct, scored, distance)

    def score_lines_across_blocks(self, predictions: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """`score_predictions` for lines, with the previous block's last word in front: (B, T + 1) after the first."""
        assert batch.answer_id is not None
        assert batch.answer_distance is not None
        correct, in_line = predictions == batch.targets, batch.answer_id >= 0
        self.words += torch.stack([in_line.sum(), (correct & in_line).sum()])
        parts: tuple[Tensor, ...] = (correct, batch.answer_id, batch.answer_distance)
        if self.last_word is not None:
            parts = tuple(torch.cat(pair, dim=1) for pair in zip(self.last_word, parts, strict=True))
        correct_so_far, ends = score_lines(parts[0], parts[1])
        self.last_word = correct_so_far[:, -1:], parts[1][:, -1:], parts[2][:, -1:]
        return correct_so_far, ends, parts[2]

    def sum_over_streams(self, others: Sequence["AnswerMetrics"]) -> None:
        """Count the answers of other micro-batches, too, and then those of all ranks."""
        for other in others:
            self.nats += other.nats
            self.counts += other.counts
            self.words += other.words
            self.by_distance.counts += other.by_distance.counts
            self.by_distance.num_beyond += other.by_distance.num_beyond
        self.nats, self.counts, self.words = (ranks.sum_tensor(each) for each in (self.nats, self.counts, self.words))
        self.by_distance.sum_over_ranks()

    def metrics(self, metric: str, bytes_per_token: float, extra_metrics: Iterable[str] = ()) -> Metrics:
        """The loss (nats per target), the task's metrics and, if they are about accuracy, these by distance.

        For lines also the accuracy of single words, each given the true words before it.
        """
        targets, answers, correct = self.counts.tolist()
        loss = self.nats.item() / targets if targets else math.nan
        metrics = {"loss": loss}
        for name in (metric, *extra_metrics):
            metrics[name] = loss_to_metric(name, loss, ratio(correct, answers), bytes_per_token)
        if self.scoring == "line":
            words, correct_words = self.words.tolist()
            metrics["word_accuracy"] = ratio(correct_words, words)
        if metric in ACCURACY_METRICS:
            metrics |= self.by_distance.beyond_reach()
            for name, accuracy in self.by_distance.accuracies().items():
                metrics[f"{metric}_{name}"] = loss_to_metric(metric, math.nan, accuracy)
        return metrics


def ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
