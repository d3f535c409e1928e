"""`run.profile=true`: where the time and the memory of a few updates go."""

import gzip
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.autograd import DeviceType

from ..run_folder.files import write_atomically

log = logging.getLogger(__name__)

SKIPPED_UPDATES = 5  # after a start: code is compiled, and memory is taken from the system
RECORDED_UPDATES = 2  # few, as each operation is an event of the trace
MEMORY_EVENTS = 100_000  # the last allocations and frees in the snapshot
NAME_LENGTH = 60  # of an operation in the log: kernels may have long ones


@contextmanager
def profiler(enabled: bool, folder: Path, device: torch.device) -> Iterator[Callable[[], None]]:
    """Record two updates after the first ones, and yield the function to call after each update.

    The run folder then has trace.json.gz, for ui.perfetto.dev or chrome://tracing, and on CUDA memory.pickle, for
    pytorch.org/memory_viz. The ten operations that took the most time are logged.
    """
    if not enabled:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=SKIPPED_UPDATES - 1, warmup=1, active=RECORDED_UPDATES, repeat=1)
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        with profile(activities=activities, schedule=plan, on_trace_ready=partial(save, folder, device)) as recording:
            yield recording.step
        if recording.step_num <= SKIPPED_UPDATES:
            log.warning(f"run.profile: nothing was recorded, as this start had no more than {SKIPPED_UPDATES} updates")
    finally:
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)


def save(folder: Path, device: torch.device, recording: Any) -> None:
    """Write the trace and the snapshot, and log the dearest operations."""
    with TemporaryDirectory() as temporary:
        trace = Path(temporary) / "trace.json"
        recording.export_chrome_trace(str(trace))
        write_atomically(folder / "trace.json.gz", gzip.compress(trace.read_bytes()))
        if device.type == "cuda":
            snapshot = Path(temporary) / "memory.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            write_atomically(folder / "memory.pickle", snapshot.read_bytes())
    log.info(f"run.profile: {dearest_operations(recording.key_averages(), device)}; {folder / 'trace.json.gz'}")


def dearest_operations(averages: Any, device: torch.device, count: int = 10) -> str:
    """The operations with the most time of their own, on CUDA the kernels, with their share of all of it."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {
        average.key: getattr(average, attribute)
        for average in averages
        if average.device_type == kind and not average.is_user_annotation
    }
    total = sum(times.values()) or 1
    dearest = sorted(times, key=lambda name: -times[name])[:count]
    shares = ", ".join(f"{name[:NAME_LENGTH]} {100 * times[name] / total:.1f} %" for name in dearest)
    return f"of {total / 1000:.1f} ms in {RECORDED_UPDATES} updates: {shares}"
