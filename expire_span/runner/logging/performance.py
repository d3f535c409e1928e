"""Time per step and peak memory."""

import os
import resource
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import ranks
from .metrics import Metrics


class StepTimer:
    """Measures the phases of training; on CUDA by device events, because the CPU only queues work there.

    A phase may lie within another one, such as a rollout within an update.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.intervals: dict[str, list[tuple[Any, Any]]] = defaultdict(list)  # starts and ends of each phase

    def now(self) -> Any:
        """A point in time: an event on CUDA, else seconds."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, start: Any) -> None:
        """Add one interval of a phase: from `start`, a result of `now`, until now."""
        self.intervals[phase].append((start, self.now()))

    def pop(self) -> tuple[Counter[str], Counter[str]]:
        """How many intervals each phase has had since the last call, and its total time in milliseconds.

        With several ranks, the time of the slowest.
        """
        if self.cuda:
            torch.cuda.synchronize()
        counts, milliseconds = Counter[str](), Counter[str]()
        for phase, intervals in self.intervals.items():
            counts[phase] = len(intervals)
            milliseconds[phase] = sum(
                start.elapsed_time(end) if self.cuda else 1000 * (end - start) for start, end in intervals
            )
        self.intervals.clear()
        slowest = ranks.max_numbers(list(milliseconds.values()))
        return counts, Counter(dict(zip(milliseconds, slowest, strict=True)))


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count: the jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # on Linux this sets the peak resident size to the current one
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> Metrics:
    """The largest of all ranks, in GB, see `own_peak_memory`."""
    own = own_peak_memory(device)
    return dict(zip(own, ranks.max_numbers(list(own.values())), strict=True))


def own_peak_memory(device: torch.device) -> Metrics:
    """In GB. CUDA: peak allocated and reserved memory; elsewhere the peak resident size of the whole process."""
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


def free_memory() -> int:
    """Bytes of memory that can be taken, also in a container."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # it may be "max"
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(free)
