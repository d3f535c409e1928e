"""Expire-Span beside Transformer-XL, with the same memory and with all of it, on the copy task; on a CPU, in minutes.

Trains the three, then prints a table of them and draws demo/copy.png. `make demo` calls it.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from hydra.utils import instantiate

from expire_span.analysis import spans_over_time
from expire_span.runner.build import build_model
from expire_span.runner.checkpoint import load
from expire_span.runner.main import saved_config
from expire_span.runner.report import Run, load_runs, table
from expire_span.runner.training import load_weights

COLOURS = {"Expire-Span": "#d1495b", "Transformer-XL, same memory": "#8d99ae", "Transformer-XL, all": "#2b6777"}


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """One training run in a process of its own, with one thread: the models are small."""
    settings = ["task=copy", "size=mini", "run.threads=1", "run.device=cpu", "wandb.mode=disabled", "run.log_every=20"]
    command = [sys.executable, "-m", "expire_span", *settings, *overrides, f"hydra.run.dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(command, stdout=open(folder / "output.txt", "w"), stderr=subprocess.STDOUT)


def wait(processes: dict[str, subprocess.Popen], folder: Path) -> None:
    """Until they end; meanwhile, once in a while, how far each is."""
    said = ""
    while any(process.poll() is None for process in processes.values()):
        time.sleep(1)
        for name, process in processes.items():
            lines = [line for line in (folder / name / "output.txt").read_text().splitlines() if "update" in line]
            if process.poll() is None and lines and lines[-1] != said and lines[-1].split(":")[0].endswith("00"):
                said = lines[-1]
                print(f"  {name:14} {said}", flush=True)
    for name, process in processes.items():
        if process.returncode:
            sys.exit(f"{name} failed:\n{(folder / name / 'output.txt').read_text()}")


def draw(folder: Path, runs: dict[str, Run], steps: int = 512) -> None:
    """Left, who remembers how far; right, what Expire-Span keeps of one episode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    for name, run in runs.items():
        bins = [(key, value) for key, value in run.figures.items() if key.startswith("test/accuracy_distance_")]
        far = [int(key.split("_")[-1]) for key, _ in bins]
        left.plot(far, [100 * value for _, value in bins], "o-", color=COLOURS[name],
                  label=f"{name}: {run.figures['test/memory/size']:.0f} memories")  # fmt: skip
    left.axhline(25, color="grey", linestyle=":", linewidth=1)
    left.text(2, 27, "guessing", color="grey", fontsize=8)
    left.set(xscale="log", xlabel="the A's are at most so many timesteps back", ylabel="copied right, %", ylim=(0, 104))
    left.set_xticks(far, [str(each) for each in far], minor=False)
    left.minorticks_off()
    left.legend(loc="lower left", fontsize=8, frameon=False)

    spans, tokens = episode(folder / "expire_span")
    for layer, (span, shade) in enumerate(zip(spans, ("#edae49", "#d1495b"), strict=False)):
        right.plot(span, linewidth=1, color=shade, label=f"layer {layer + 1}")
    for place in (tokens == 0).nonzero().flatten().tolist():
        right.axvline(place, color="#2b6777", linewidth=0.8, alpha=0.4)
    right.set(xlabel="timestep of an episode (blue: the A's)", ylabel="span given to it, timesteps", xlim=(0, steps))
    right.legend(fontsize=8, frameon=False)
    figure.savefig(folder / "copy.png", dpi=130)


def episode(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans (layers, time) and tokens (time,) of one test episode in which the A's come early."""
    config = saved_config(folder)
    task = instantiate(config.task)
    model = build_model(config, task, torch.device("cpu"))
    load_weights(model, load(folder) or {}, folder)
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
    folder, common = arguments.folder, [f"seed={arguments.seed}", *arguments.overrides]
    began = time.time()

    print("Copy: how many A's were there, up to 500 timesteps ago? Three models learn it.")
    processes = {
        "expire_span": start(folder / "expire_span", "model=expire_span", *common),
        "trans_xl_all": start(folder / "trans_xl_all", "model=trans_xl", *common),
    }
    wait({"expire_span": processes["expire_span"]}, folder)
    [expire] = load_runs([folder / "expire_span"])
    same = math.ceil(expire.figures["test/memory/size"])
    processes["trans_xl_same"] = start(folder / "trans_xl_same", "model=trans_xl", f"model.max_span={same}", *common)
    wait(processes, folder)

    runs = load_runs([folder / name for name in ("expire_span", "trans_xl_same", "trans_xl_all")])
    text = table(runs)
    (folder / "table.md").write_text(text)
    draw(folder, dict(zip(COLOURS, runs, strict=True)))
    print(f"\n{text}\n{folder / 'copy.png'} shows who remembers how far, and what is kept.", end=" ")
    print(f"It took {(time.time() - began) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
