"""Expire-Span and Transformer-XL on the copy task, on a CPU, in minutes.

Trains Expire-Span, Transformer-XL with as much memory, and Transformer-XL with the full memory; then prints a table
and draws demo/seed1/copy.png. `make demo` calls this.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from expire_span.analysis import spans_over_time
from expire_span.runner.load_run import load_run
from expire_span.runner.logging.metrics import Metrics
from expire_span.runner.run_folder.config_files import load_config
from expire_span.runner.run_folder.files import read_summary

LINE_STYLES: dict[str, dict] = {  # the last line is wide and pale, so that lines on top of it can be seen
    "Expire-Span": {"color": "#d1495b", "zorder": 3},
    "Transformer-XL, same memory": {"color": "#8d99ae"},
    "Transformer-XL, full memory": {"color": "#2b6777", "linewidth": 6, "markersize": 12, "alpha": 0.4},
}


def start_run(folder: Path, *overrides: str) -> subprocess.Popen:
    """Start a training run in a process of its own, with one thread, since the models are small."""
    settings = ["task=copy", "size=mini", "wandb.mode=disabled"]
    settings += ["run.num_threads=1", "run.device=cpu", "run.log_every=20"]
    command = [sys.executable, "-m", "expire_span", *settings, *overrides, f"hydra.run.dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, stdout=open(folder / "output.txt", "w"), stderr=subprocess.STDOUT)


def wait(processes: list[subprocess.Popen], folder: Path, printed: set[str]) -> None:
    """Wait until the processes end, and print the progress of each run every 100 updates."""
    while any(process.poll() is None for process in processes):
        time.sleep(1)
        for output in sorted(folder.glob("*/output.txt")):
            for line in output.read_text().splitlines():
                text = f"  {output.parent.name:14} {line}"
                if re.match(r"update \d+00:", line) and text not in printed:
                    printed.add(text)
                    print(text, flush=True)
    if any(process.returncode for process in processes):
        sys.exit(f"a run failed; {folder}/*/output.txt says why")


def markdown_table(metrics_by_name: dict[str, Metrics]) -> str:
    columns = ["model", "test accuracy", "memories held", "memory per stream"]
    columns += ["ms per training step", "ms per memory-only block", "peak resident memory"]
    rows = ["| " + " | ".join(columns) + " |", "| " + " | ".join(["---"] * len(columns)) + " |"]
    for name, metrics in metrics_by_name.items():
        accuracy, held, state_bytes = (metrics[f"test/{key}"] for key in ("accuracy", "memory/held", "memory/bytes"))
        cells = [name, f"{accuracy:.1%}", f"{held:.1f}", f"{state_bytes / 1000:.1f} kB"]
        cells += [f"{metrics[f'perf/ms_per_{phase}']:.0f}" for phase in ("batch", "memory_block")]
        rows.append("| " + " | ".join([*cells, f"{metrics['perf/peak_resident_gb']:.2f} GB"]) + " |")
    return "\n".join(rows) + "\n"


def plot(folder: Path, metrics_by_name: dict[str, Metrics]) -> None:
    """Left: accuracy by distance. Right: the spans that Expire-Span gives to one episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for name, metrics in metrics_by_name.items():
        bins = {key: value for key, value in metrics.items() if key.startswith("test/accuracy_distance_")}
        distances = [int(key.split("_")[-1]) for key in bins]
        label = f"{name}: {metrics['test/memory/held']:.0f} memories"
        left.plot(distances, [100 * value for value in bins.values()], "o-", label=label, **LINE_STYLES[name])
    left.axhline(25, color="gray", linestyle=":", linewidth=1)
    left.text(13, 27, "guessing", color="gray", fontsize=8)
    left.set(xscale="log", xlim=(12, 1.2 * distances[-1]), ylim=(0, 104), title="Accuracy by distance")
    left.set(xlabel="timesteps back to the A's, at most", ylabel="accuracy, %")
    ticks = [distance for distance in distances if distance >= 16]
    left.set_xticks(ticks, [str(distance) for distance in ticks])
    left.minorticks_off()
    left.legend(loc="lower left", fontsize=8, frameon=False)

    spans, tokens = spans_of_an_episode(folder / "expire_span")
    for layer, (span, color) in enumerate(zip(spans, ("#edae49", "#d1495b"), strict=False)):
        right.plot(span, linewidth=1.2, color=color, label=f"layer {layer}")
    for timestep in (tokens == 0).nonzero().flatten().tolist():
        right.axvline(timestep, color="#2b6777", linewidth=0.8, alpha=0.4)
    right.set(title="Spans that Expire-Span predicts", xlim=(0, len(tokens)))
    right.set(xlabel="timestep of one episode (blue: the A's, and their copy)", ylabel="span, timesteps")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(folder / "copy.png", dpi=130)


def spans_of_an_episode(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans (layers, time) and tokens (time,) of a test episode with at least three A's in its first quarter."""
    config = load_config(folder)
    _, task, model, *_ = load_run(folder, config)
    blocks = []
    for batch in task.stream("test", 64, config.train.block_size):
        blocks.append((batch.tokens, batch.reach))
        if len(blocks) * config.train.block_size == task.episode_length:
            break
    spans, tokens = spans_over_time(model, blocks)
    early_as = (tokens[:, : task.episode_length // 4] == 0).sum(1)  # (B,)
    episode = (early_as >= 3).float().argmax()
    return spans[:, episode], tokens[episode]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where runs, table and picture go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="for all three runs, such as train.updates=100")
    options = parser.parse_args()
    folder, common = options.folder / f"seed{options.seed}", [f"seed={options.seed}", *options.overrides]
    start_time = time.time()

    print("Copy: how many A's were there, up to 250 timesteps ago? Three models learn it, two at a time.")
    printed: set[str] = set()
    expire_span = start_run(folder / "expire_span", "model=expire_span", *common)
    all_memory = start_run(folder / "trans_xl_all", "model=trans_xl", *common)
    wait([expire_span], folder, printed)
    held = math.ceil(read_summary(folder / "expire_span")["metrics"]["test/memory/held"])
    same_memory = start_run(folder / "trans_xl_same", "model=trans_xl", f"model.max_span={held}", *common)
    wait([all_memory, same_memory], folder, printed)

    folders = [folder / name for name in ("expire_span", "trans_xl_same", "trans_xl_all")]
    metrics_by_name = {name: read_summary(run)["metrics"] for name, run in zip(LINE_STYLES, folders, strict=True)}
    table = markdown_table(metrics_by_name)
    (folder / "table.md").write_text(table)
    plot(folder, metrics_by_name)
    print(f"\n{table}\n{folder / 'copy.png'} shows accuracy by distance, and the spans of one episode: look at it.")
    minutes = (time.time() - start_time) / 60
    print(f"This took {minutes:.1f} minutes. `expire-span-report {folder}` shows all metrics.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the runs receive it too, and save themselves
        sys.exit("\nstopped; run it again to resume")
