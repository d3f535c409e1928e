"""Figures: how good, how large, how fast."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from expire_span.tasks.stream import IGNORED, Batch

Figures = dict[str, float]
SHARES = ("accuracy", "error")  # measures that are about right answers
BINS = 40  # powers of two: a distance d counts in the bin of floor(log2 d)


class Meter:
    """Means over an interval. What is added stays on the device until it is read, once."""

    def __init__(self) -> None:
        self.added: dict[str, list[Any]] = defaultdict(list)

    def add(self, figures: dict[str, Any]) -> None:
        for name, figure in figures.items():
            self.added[name].append(figure)

    def values(self) -> dict[str, list[float]]:
        """Every figure as it was added, as numbers."""
        for name, figures in self.added.items():
            tensors = [each for each in figures if isinstance(each, Tensor)]
            if tensors:  # one copy from the device for all of them
                numbers = iter(torch.stack([each.detach().float() for each in tensors]).tolist())
                self.added[name] = [next(numbers) if isinstance(each, Tensor) else each for each in figures]
        return dict(self.added)

    def means(self) -> dict[str, float]:
        """The mean of each, leaving out what was not a number at all; empties the meter."""
        means = {}
        for name, figures in self.values().items():
            known = [each for each in figures if not math.isnan(each)]
            means[name] = sum(known) / len(known) if known else math.nan
        self.added.clear()
        return means


def judged(best: Tensor, batch: Batch, answer: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which answers are right, which are asked for, and how far back each lies: (B, T), or (B,) per block.

    best (B, T): what the model answers; answer: a task's. Per block, a stream's targets are one answer, right when all
    of them are; a line is judged where it ends, by those of its words that are in the block.
    """
    asked = batch.targets != IGNORED  # (B, T)
    right = best == batch.targets  # (B, T)
    if answer == "token":
        return right, asked, batch.distance
    if answer == "line":
        assert batch.answer is not None
        return *judged_lines(right, batch.answer), batch.distance
    distance = None if batch.distance is None else batch.distance.masked_fill(~asked, 0).amax(1)
    return (right | ~asked).all(1) & asked.any(1), asked.any(1), distance


def judged_lines(right: Tensor, line: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a line is right up to and with each word, and whether it ends with it; the last may go on. (B, T) each.

    right (B, T): of each word; line (B, T): the number of the line that it belongs to, -1 for none.

    What a model would write, always taking the likeliest word, is the line exactly when each of its words is the
    likeliest after the true words before it: so scores given the true text tell what it would write by itself.
    """
    changes = line[:, 1:] != line[:, :-1]  # (B, T - 1)
    begins, ends = pad(changes, (1, 0), value=True), pad(changes, (0, 1), value=False)  # (B, T)
    wrong = (~right).long()
    so_far = wrong.cumsum(1)
    before = (so_far - wrong).where(begins, 0).cummax(1).values  # wrong words before the line's first
    return so_far == before, ends & (line >= 0)


class ByDistance:
    """How many of the answers are right, by how far back they lie, in bins between powers of two."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, BINS, dtype=torch.long, device=device)  # answers, right answers

    def add(self, right: Tensor, asked: Tensor, distance: Tensor) -> None:
        """right, asked and distance, in timesteps: of one shape."""
        place = distance.clamp(min=1).float().log2().long()
        for row, which in enumerate((asked, asked & right)):
            self.counts[row] += torch.bincount(place[which], minlength=BINS)

    def shares(self) -> Figures:
        """The share of right ones as distance_LOW_HIGH, where there are any."""
        return {
            f"distance_{2**power if power else 0}_{2 ** (power + 1)}": right / asked
            for power, (asked, right) in enumerate(self.counts.T.tolist())
            if asked
        }


class Answers:
    """How well the targets were answered: likelihood of each, share of right answers, and that by distance.

    A line may begin in one block and end in the next; one that goes on when the split ends does not count.
    """

    def __init__(self, answer: str, device: torch.device):
        self.answer = answer
        self.nats = torch.zeros((), dtype=torch.float if device.type == "mps" else torch.double, device=device)
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # targets, answers, right answers
        self.words = torch.zeros(2, dtype=torch.long, device=device)  # of lines: all, right given the true ones before
        self.by_distance = ByDistance(device)
        self.begun: tuple[Tensor, ...] | None = None  # of each stream's last word, as `lines`

    def add(self, losses: Tensor, best: Tensor | None, batch: Batch) -> None:
        """losses (n,): nats of the targets that are asked for; best (B, T): what the model answers, if that matters."""
        self.nats += losses.sum()
        self.counts[0] += (batch.targets != IGNORED).sum()
        if best is None:
            return
        of_lines = self.answer == "line"
        right, asked, distance = self.lines(best, batch) if of_lines else judged(best, batch, self.answer)
        self.counts[1:] += torch.stack([asked.sum(), (right & asked).sum()])
        if distance is not None:
            self.by_distance.add(right, asked, distance)

    def lines(self, best: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """`judged` from the last word of the block before on: (B, T + 1), but (B, T) in the first block."""
        assert batch.answer is not None
        assert batch.distance is not None
        right = best == batch.targets
        self.words += torch.stack([(batch.answer >= 0).sum(), (right & (batch.answer >= 0)).sum()])
        parts: tuple[Tensor, ...] = (right, batch.answer, batch.distance)
        if self.begun is not None:
            parts = tuple(torch.cat(pair, dim=1) for pair in zip(self.begun, parts, strict=True))
        whole, ended = judged_lines(parts[0], parts[1])
        self.begun = whole[:, -1:], parts[1][:, -1:], parts[2][:, -1:]
        return whole, ended, parts[2]

    def figures(self, measure: str, bytes_per_token: float, also: Iterable[str] = ()) -> dict[str, float]:
        """The loss (nats a target), the task's figure by its name, and, where it is a share, that by distance too.

        Of lines also the share of right words, each given the true text before it. also: names of further figures.
        """
        targets, asked, right = self.counts.tolist()
        loss = self.nats.item() / targets if targets else math.nan
        figures = {"loss": loss}
        for name in (measure, *also):
            figures[name] = in_terms_of(name, loss, share(right, asked), bytes_per_token)
        if self.answer == "line":
            words, right_words = self.words.tolist()
            figures["word_accuracy"] = share(right_words, words)
        if measure in SHARES:
            shares = self.by_distance.shares()
            figures |= {f"{measure}_{name}": in_terms_of(measure, math.nan, right) for name, right in shares.items()}
        return figures


def share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def in_terms_of(measure: str, loss: float, accuracy: float, bytes_per_token: float = 1.0) -> float:
    """A task's figure, out of nats a target and the share of right answers."""
    if measure == "bpb":
        return loss / math.log(2) / bytes_per_token
    if measure == "bpc":  # a token is a character
        return loss / math.log(2)
    if measure == "ppl":
        return math.exp(min(loss, 700.0))
    return accuracy if measure == "accuracy" else 1 - accuracy


class Stopwatch:
    """Milliseconds between starts and stops: by device events on CUDA, since work is only queued from here."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []
        self.begun: Any = None

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.begun = self.now()

    def stop(self) -> None:
        self.laps.append((self.begun, self.now()))

    def read(self) -> float:
        """Milliseconds since the last reading."""
        if self.cuda:
            torch.cuda.synchronize()
        laps, self.laps = self.laps, []
        return sum(start.elapsed_time(end) if self.cuda else 1000 * (end - start) for start, end in laps)


def reset_peak_memory(device: torch.device) -> None:
    """Peaks count from here on: the jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux: the peak resident size becomes the present one
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> dict[str, float]:
    """In GB. CUDA: most bytes allocated and reserved; elsewhere the peak resident size of the process, named so."""
    if device.type == "cuda":
        return {
            "perf/peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "perf/peak_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return {"perf/peak_resident_gb": int(kilobytes) * 1024 / 1e9}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"perf/peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
