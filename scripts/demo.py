"""Expire-Span beside Transformer-XL, with the same memory and with all of it, on the copy task; on a CPU, in minutes.

Trains the three, then prints a table of them and draws demo/seed1/copy.png. `make demo` calls it.
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
from expire_span.runner.report import Run, load_runs
from expire_span.runner.saved import open_run, saved_config

LINES: dict[str, dict] = {  # the last one wide and pale, so that what lies on it is seen
    "Expire-Span": {"color": "#d1495b", "zorder": 3},
    "Transformer-XL, same memory": {"color": "#8d99ae"},
    "Transformer-XL, all": {"color": "#2b6777", "linewidth": 6, "markersize": 12, "alpha": 0.4},
}


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """One training run in a process of its own, with one thread: the models are small."""
    settings = ["task=copy", "size=mini", "run.threads=1", "run.device=cpu", "wandb.mode=disabled", "run.log_every=20"]
    command = [sys.executable, "-m", "expire_span", *settings, *overrides, f"hydra.run.dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, stdout=open(folder / "output.txt", "w"), stderr=subprocess.STDOUT)


def wait(processes: list[subprocess.Popen], folder: Path, said: set[str]) -> None:
    """Until they end; meanwhile, every 100 updates, how far each run is."""
    while any(process.poll() is None for process in processes):
        time.sleep(1)
        for output in sorted(folder.glob("*/output.txt")):
            for line in output.read_text().splitlines():
                words = f"  {output.parent.name:14} {line}"
                if re.match(r"update \d+00:", line) and words not in said:
                    said.add(words)
                    print(words, flush=True)
    if any(process.returncode for process in processes):
        sys.exit(f"a run failed; {folder}/*/output.txt says why")


def small_table(runs: dict[str, Run]) -> str:
    rows = ["| model | copied right, test | memory size | state of a stream | ms per batch | peak memory, process |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name, run in runs.items():
        figures = run.figures
        right, size, state = (figures[f"test/{each}"] for each in ("accuracy", "memory/size", "memory/bytes"))
        speed, peak = figures["perf/ms_per_batch"], figures["perf/peak_resident_gb"]
        rows.append(f"| {name} | {right:.1%} | {size:.1f} | {state / 1000:.1f} kB | {speed:.0f} | {peak:.2f} GB |")
    return "\n".join(rows) + "\n"


def draw(folder: Path, runs: dict[str, Run]) -> None:
    """Left, who remembers how far; right, what Expire-Span keeps of one episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for name, run in runs.items():
        bins = {key: value for key, value in run.figures.items() if key.startswith("test/accuracy_distance_")}
        far = [int(key.split("_")[-1]) for key in bins]
        memories = f"{run.figures['test/memory/size']:.0f} memories"
        left.plot(far, [100 * each for each in bins.values()], "o-", label=f"{name}: {memories}", **LINES[name])
    left.axhline(25, color="grey", linestyle=":", linewidth=1)
    left.text(13, 27, "guessing", color="grey", fontsize=8)
    left.set(xscale="log", xlim=(12, 1.2 * far[-1]), ylim=(0, 104), title="Who remembers how far")
    left.set(xlabel="timesteps back to the A's, at most", ylabel="copied right, %")
    left.set_xticks([each for each in far if each >= 16], [str(each) for each in far if each >= 16])
    left.minorticks_off()
    left.legend(loc="lower left", fontsize=8, frameon=False)

    spans, tokens = episode(folder / "expire_span")
    for layer, (span, shade) in enumerate(zip(spans, ("#edae49", "#d1495b"), strict=False)):
        right.plot(span, linewidth=1.2, color=shade, label=f"layer {layer}")
    for place in (tokens == 0).nonzero().flatten().tolist():
        right.axvline(place, color="#2b6777", linewidth=0.8, alpha=0.4)
    right.set(title="What Expire-Span keeps", xlim=(0, len(tokens)))
    right.set(xlabel="timestep of one episode (blue: the A's, and their copy)", ylabel="span given to it, timesteps")
    right.legend(fontsize=8, frameon=False)
    figure.savefig(folder / "copy.png", dpi=130)


def episode(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans (layers, time) and tokens (time,) of one test episode in which the A's come early."""
    config = saved_config(folder)
    _, task, model, *_ = open_run(folder, config)
    blocks = []
    for batch in task.stream("test", 64, config.train.block):
        blocks.append((batch.tokens, batch.reach))
        if len(blocks) * config.train.block == task.distance:
            break
    spans, tokens = spans_over_time(model, blocks)
    early = ((tokens[:, : task.distance // 4] == 0).sum(1) >= 3).float().argmax()  # the first with three A's early on
    return spans[:, early], tokens[early]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where runs, table and picture go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="for all three runs, such as train.updates=100")
    arguments = parser.parse_args()
    folder, common = arguments.folder / f"seed{arguments.seed}", [f"seed={arguments.seed}", *arguments.overrides]
    began = time.time()

    print("Copy: how many A's were there, up to 250 timesteps ago? Three models learn it, two at a time.")
    said: set[str] = set()
    first = start(folder / "expire_span", "model=expire_span", *common)
    everything = start(folder / "trans_xl_all", "model=trans_xl", *common)
    wait([first], folder, said)
    [expire] = load_runs([folder / "expire_span"])
    same = math.ceil(expire.figures["test/memory/size"])
    third = start(folder / "trans_xl_same", "model=trans_xl", f"model.max_span={same}", *common)
    wait([everything, third], folder, said)

    found = load_runs([folder / name for name in ("expire_span", "trans_xl_same", "trans_xl_all")])
    runs = dict(zip(LINES, found, strict=True))
    text = small_table(runs)
    (folder / "table.md").write_text(text)
    draw(folder, runs)
    print(f"\n{text}\n{folder / 'copy.png'} shows who remembers how far, and what is kept: look at it.")
    print(f"That took {(time.time() - began) / 60:.1f} minutes. `expire-span-report {folder}` has all the figures.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the runs hear it too, and save themselves
        sys.exit("\nstopped; started again, it goes on from where it was")
