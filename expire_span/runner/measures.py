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
from torch.nn.functional import cross_entropy

from expire_span.tasks.stream import IGNORED, Batch

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


def loss_of(scores: Tensor, batch: Batch, reduction: str = "mean") -> Tensor:
    """Nats, over the targets that are asked for. scores (B, T, classes), of which bfloat16 is too coarse for a loss."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(0, 1)
    return cross_entropy(scores, batch.targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def judged(scores: Tensor, batch: Batch, per_block: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which answers are right, which are asked for, and how far back each lies: (B, T), or (B,) per block.

    scores (B, T, classes); per block, a stream's targets are one answer, right when all of them are.
    """
    asked = batch.targets != IGNORED  # (B, T)
    right = scores.argmax(-1) == batch.targets  # (B, T)
    if not per_block:
        return right, asked, batch.distance
    distance = None if batch.distance is None else batch.distance.masked_fill(~asked, 0).amax(1)
    return (right | ~asked).all(1) & asked.any(1), asked.any(1), distance


class Answers:
    """How well the targets were answered: likelihood of each, share of right answers, and that by distance."""

    def __init__(self, per_block: bool, device: torch.device):
        self.per_block = per_block
        self.nats = torch.zeros((), dtype=torch.float if device.type == "mps" else torch.double, device=device)
        self.counts = torch.zeros(3, dtype=torch.long, device=device)  # targets, answers, right answers
        self.by_distance = torch.zeros(2, BINS, dtype=torch.long, device=device)  # answers, right answers

    def add(self, scores: Tensor, batch: Batch) -> None:
        """scores (B, T, classes)."""
        right, asked, distance = judged(scores, batch, self.per_block)
        self.nats += loss_of(scores, batch, reduction="sum")
        self.counts += torch.stack([(batch.targets != IGNORED).sum(), asked.sum(), (right & asked).sum()])
        if distance is not None:
            place = distance.clamp(min=1).float().log2().long()
            for row, which in enumerate((asked, asked & right)):
                self.by_distance[row] += torch.bincount(place[which], minlength=BINS)

    def figures(self, measure: str, bytes_per_token: float, also: Iterable[str] = ()) -> dict[str, float]:
        """The loss (nats a target), the task's figure by its name, and, where it is a share, that by distance too.

        also: names of further figures to be told beside
        """
        targets, asked, right = self.counts.tolist()
        loss = self.nats.item() / targets if targets else math.nan
        figures = {"loss": loss}
        for name in (measure, *also):
            figures[name] = in_terms_of(name, loss, share(right, asked), bytes_per_token)
        if measure in ("accuracy", "error"):
            for power, (asked, right) in enumerate(self.by_distance.T.tolist()):
                if asked:
                    name = f"{measure}_distance_{2**power if power else 0}_{2 ** (power + 1)}"
                    figures[name] = in_terms_of(measure, math.nan, share(right, asked), bytes_per_token)
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
