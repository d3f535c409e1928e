"""Compare the predicted memory of a training step on a CPU with what is measured, for all models at three sizes.

    python scripts/plan_memory.py                    prints the table
    python scripts/plan_memory.py --markdown FILE    writes it, with its origin

Each case is a process of its own: a run on random bytes, until its memories are full. Two things are measured in its
last steps. Tensors: the bytes of all that are alive before the step, and the most that its allocations add, as torch's
profiler counts them, also those within C++. Resident: the peak size of the process, less what it was after all imports
and a tiny step. It has the allocator's gaps and the buffers of MKL, too, for which the model adds a share.
"""

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from torch.profiler import ProfilerActivity, profile

from expire_span.memory import Memory
from expire_span.runner.commands.output_files import output_path, write_output
from expire_span.runner.config.schema import validate
from expire_span.runner.cost_model import OVERHEAD, initial_memories, memory_by_part, run_sizes
from expire_span.runner.logging.performance import peak_memory, reset_peak_memory
from expire_span.runner.run_folder.provenance import provenance
from expire_span.runner.train import train_step
from expire_span.runner.trainer import Trainer

MODELS = ("trans_xl", "compressive", "expire_span", "adaptive_span")
SIZES = {  # layers, d, heads, feed-forward, streams, block, span
    "small": (2, 64, 2, 256, 16, 64, 512),
    "medium": (4, 256, 4, 1024, 16, 128, 512),
    "large": (2, 512, 8, 2048, 4, 256, 512),  # the paper's layers
}
KEYS = ("transformer.num_layers", "transformer.hidden_size", "transformer.num_heads", "transformer.feedforward_size",
        "train.batch_size", "train.block_size", "memory.max_span")  # fmt: skip
COMMON = ["task=text", "size=small", "memory.init_span_ratio=0.5", "optimizer.lr=1e-12", "eval.batch_size=1",
          "lr_schedule.warmup_updates=0", "run.device=cpu", "run.num_threads=1", "eval.interval=null"]  # fmt: skip
WARM_UP = ["transformer.num_layers=1", "transformer.hidden_size=8", "transformer.num_heads=1", "train.batch_size=1",
           "transformer.feedforward_size=8", "train.block_size=16", "memory.max_span=32"]  # fmt: skip
COLUMNS = ("model", "size", "tensors: predicted MB", "measured MB", "ratio", "resident: predicted MB", "measured MB",
           "ratio")  # fmt: skip
TEXT = [
    "The memory of a training step on a CPU, as `expire-span-plan` predicts it, beside what is measured, of tensors "
    "and of the process. The script says how.",
    "",
    *(
        f"- {name}: {layers} layers of d {width}, {heads} heads, feed-forward {inner}, {streams} streams in blocks of "
        f"{block}, span {span}"
        for name, (layers, width, heads, inner, streams, block, span) in SIZES.items()
    ),
    "- Compressive holds as many pooled memories as others; Expire-Span and Adaptive-Span hold what spans of half of L "
    "keep.",
]


def measure(case: tuple[str, str, tuple[str, ...]]) -> dict[str, float]:
    """Bytes of one case, in this process: predicted, allocated and resident."""
    model, size, overrides = case
    values = [f"{key}={value}" for key, value in zip(KEYS, SIZES[size], strict=True)]
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, initialize_config_module("expire_span.conf", version_base="1.3"):
        text = Path(folder) / "text"
        text.write_bytes(np.random.default_rng(0).integers(256, size=400_000, dtype=np.uint8).tobytes())
        names = [f"model={model}", f"task.path={text}"]
        config = validate(compose("config", overrides=[*COMMON, *names, *values, *overrides]))
        warm_up = validate(compose("config", overrides=[*COMMON, *names, *WARM_UP]))
        train_step(Trainer(warm_up, Path(folder)))  # imports and loads what is imported and loaded on first use
        gc.collect()
        resident_before, others = resident_bytes(), live_bytes()
        trainer = Trainer(config, Path(folder))
        for _ in range(2 + 2 * trainer.model.max_reach() // config.train.block_size):
            train_step(trainer)
        trainer.averager.pop_means()
        reset_peak_memory(device)
        train_step(trainer)
        resident = peak_memory(device)["perf/peak_resident_gb"] * 1e9 - resident_before
        before = live_bytes() - others
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(trainer)
        sizes = run_sizes(config, 256, 256)
        streams = config.train.batch_size
        layers: list[Memory] = trainer.states[0]["layers"]
        held = sum(len(memory.time) for memory in layers) / config.transformer.num_layers / streams
        micro_batch = config.train.get("micro_batch_size") or streams
        predicted = memory_by_part(sizes, streams, micro_batch, initial_memories(sizes.mechanism), "cpu")
    peak = before + peak_of(profiler)
    return {"predicted": sum(predicted.values()), "allocated": peak, "resident": resident, "held": held, **predicted}


def live_bytes() -> int:
    """Bytes of all tensors that are alive, counting each storage once."""
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(profiler: profile) -> int:
    """The most that the profiled allocations, less what was freed, add up to at any time."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).max())


def measure_in_subprocess(case: tuple[str, str, tuple[str, ...]]) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--overrides", nargs="*", default=[], help="of the config of every case")
    parser.add_argument("--parts", action="store_true", help="print the predicted parts of each case, too")
    parser.add_argument("--markdown", type=output_path, metavar="FILE", help="write the table to a file, too")
    options = parser.parse_args()
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    print("\n".join(lines))
    for model in options.models:
        for size in options.sizes:
            result = measure_in_subprocess((model, size, tuple(options.overrides)))
            cells = [model, size]
            predicted = result["predicted"]
            pairs = (predicted - result[OVERHEAD], result["allocated"]), (predicted, result["resident"])
            for predicted, measured in pairs:
                cells += [f"{predicted / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{predicted / measured:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            if options.parts:
                print({name: f"{value:.4g}" for name, value in result.items()})
    if options.markdown:
        origin = provenance(sys.argv)
        lines = ["# Predicted and measured memory", "", *TEXT, "", *lines, ""]
        lines.append(f"`{origin['command']}`, one thread, {json.dumps(origin['versions'])}, commit {origin['commit']}.")
        write_output(options.markdown, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
