"""Time per step and peak memory."""

import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .metrics import Metrics


class StepTimer:
    """Measures steps in milliseconds; on CUDA by device events, because the CPU only queues work there."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.steps: list[tuple[Any, Any]] = []  # start and end
        self.step_start: Any = None

    def now(self) -> Any:
        """A point in time: an event on CUDA, else seconds."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin to time a step."""
        self.step_start = self.now()

    def stop(self) -> None:
        """End the step that `start` began."""
        self.steps.append((self.step_start, self.now()))

    def pop_milliseconds(self) -> float:
        """Total time of the steps since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        steps, self.steps = self.steps, []
        return sum(start.elapsed_time(end) if self.cuda else 1000 * (end - start) for start, end in steps)


def reset_peak_memory(device: torch.device) -> None:
    """Restart the count: the jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # on Linux this sets the peak resident size to the current one
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> Metrics:
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
