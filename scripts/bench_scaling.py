"""How training scales: two processes against one, and micro-batches against the whole batch.

    python scripts/bench_scaling.py --folder results/bench-scaling

All variants train the same model on the same random bytes, one thread (or GPU) for each process. They run one after
another in rounds, each in fresh processes; a row is the median over the rounds of the median time of an update, and
the ratio to the whole batch in one process of the same round.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module

from expire_span.runner import ranks
from expire_span.runner.config.schema import validate
from expire_span.runner.run_folder.provenance import provenance
from expire_span.runner.train import train_step
from expire_span.runner.trainer import Trainer

VARIANTS = {  # processes, micro-batches of each
    "whole batch": (1, 1),
    "2 processes": (2, 1),
    "2 micro-batches": (1, 2),
    "2 processes, 2 micro-batches": (2, 2),
}


def measure(rank: int, world_size: int, port: int, overrides: list[str], updates: int, results: Any) -> None:
    """Train in this process, and send the milliseconds of each update, and those of its gradient reduction."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {k: str(v) for k, v in numbers.items()}
    ranks.connect()
    with initialize_config_module("expire_span.conf", version_base="1.3"):
        config = validate(compose("config", overrides=overrides))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder))
        times, reductions = [], []
        for _ in range(updates):
            start = time.perf_counter()
            train_step(trainer)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
            for parameter in trainer.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            ranks.keep_pace()
            start = time.perf_counter()
            ranks.sum_gradients(trainer.model.parameters())
            reductions.append(1000 * (time.perf_counter() - start))
            trainer.optimizer.zero_grad(set_to_none=True)
    ranks.disconnect()
    warm = updates // 2  # until the memories are full
    results.put((statistics.median(times[warm:]), statistics.median(reductions[warm:])))


def run(world_size: int, overrides: list[str], updates: int) -> tuple[float, float]:
    """The slowest process's milliseconds of an update, and of its gradient reduction."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=measure, args=(rank, world_size, port, overrides, updates, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process ended with code {process.exitcode}")
    of_ranks = [results.get() for _ in processes]
    return max(update for update, _ in of_ranks), max(reduction for _, reduction in of_ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="expire_span")
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--span", type=int, default=2048, help="L, timesteps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=8, help="of which the second half is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, help="where scaling.md and scaling.json are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_bytes(np.random.default_rng(0).integers(256, size=4_000_000, dtype=np.uint8).tobytes())
        shared = [
            *(
                "task=text",
                "size=paper",
                f"model={options.model}",
                f"task.path={text}",
                "task.tokenizer=byte",
                "eval.interval=null",
            ),
            *(f"transformer.num_layers={options.num_layers}", "transformer.hidden_size=512"),
            *("transformer.num_heads=8", "transformer.feedforward_size=2048", f"memory.max_span={options.span}"),
            *("memory.ramp=128", "memory.alpha=1e-6", f"train.batch_size={options.batch_size}", "train.block_size=512"),
            *("eval.max_blocks=1", "run.num_threads=1", f"run.device={options.device}"),
            *(f"run.precision={options.precision}", "run.compile=false", "lr_schedule.final_updates=0"),
        ]
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
        for number in range(options.rounds):
            for name, (world_size, micro_batches) in VARIANTS.items():
                size = options.batch_size // world_size // micro_batches
                rounds[name].append(run(world_size, [*shared, f"train.micro_batch_size={size}"], options.updates))
                print(f"round {number + 1}, {name}: {rounds[name][-1][0]:.0f} ms", flush=True)
    lines = [
        "| variant | ms of an update | of the whole batch | of it reducing gradients, ms |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, times in rounds.items():
        ratios = [own / whole for (own, _), (whole, _) in zip(times, rounds["whole batch"], strict=True)]
        update, reduction = (statistics.median(each) for each in zip(*times, strict=True))
        lines.append(f"| {name} | {update:.0f} | {statistics.median(ratios):.2f} | {reduction:.1f} |")
    print("\n".join(lines))
    if options.folder:
        origin = provenance()
        device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread for each process"
        about = f"{device}, torch {torch.__version__}, commit {origin['commit']}: `{origin['command']}`"
        note = (
            f"{options.model}: {options.num_layers} layers of d 512, {options.batch_size} streams in blocks of 512, "
            f"L = {options.span:,}. Medians over {options.rounds} rounds in which the variants take turns; two "
            "processes have half of the streams each."
        )
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "scaling.md").write_text("\n".join(["# Scaling", "", about, "", note, "", *lines, ""]))
        (options.folder / "scaling.json").write_text(json.dumps({"about": about, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
