"""Time and memory of a training step: fused attention, its plain reference, and torch's own attentions.

    make bench                                                        the CPU table and the figure, into results/bench/
    python scripts/bench.py --model expire_span --span 4096 65536 --num-memories 500
    python scripts/bench.py --preset table4 --device cuda --precision bfloat16 --batch-size 8
    python scripts/bench.py --model expire_span --span 16384 --keep-prob 0.1 --predict     counts, and runs nothing

The streams are random tokens. Each memory of Expire-Span survives with a given probability, independently of its age,
and the span predictor runs as usual. Every case runs in a process of its own, one after another; a step is one block
forward and backward from the same full memory. Times are medians, with their quartiles.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_report import COLUMNS, MODEL_NAMES, VARIANTS, plot, ratios, table_row
from bench_step import measure_in_subprocess, step_cost

from expire_span.runner.cost_model import DEVICES, Device
from expire_span.runner.run_folder.provenance import provenance

CPU_SIZES = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "feedforward_size": 512,
    "vocab_size": 256,
    "block_size": 64,
    "ramp": 64,
}
TABLE4: dict[str, dict[str, int]] = {  # the paper's sizes; for instruction the built-in map's vocabulary
    "instruction": {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "feedforward_size": 2048, "vocab_size": 300,
                    "block_size": 512, "ramp": 64, "span": 16384},
    "collision": {"num_layers": 6, "hidden_size": 512, "num_heads": 4, "feedforward_size": 1024, "vocab_size": 84,
                  "block_size": 256, "ramp": 128, "span": 16384, "pre_norm": True},
    "enwik8": {"num_layers": 12, "hidden_size": 512, "num_heads": 8, "feedforward_size": 2048, "vocab_size": 256,
               "block_size": 512, "ramp": 128, "span": 16384},
    "pg19": {"num_layers": 12, "hidden_size": 512, "num_heads": 8, "feedforward_size": 2048, "vocab_size": 3507,
             "block_size": 512, "ramp": 128, "span": 16384},
}  # fmt: skip


def build_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"device": options.device, "precision": options.precision, "num_threads": options.num_threads}
    common |= {"repeats": options.repeats, "batch_size": options.batch_size}
    common |= {"activation_checkpointing": options.activation_checkpointing}
    sizes = CPU_SIZES | {name: value for name in CPU_SIZES if (value := getattr(options, name)) is not None}
    if options.preset == "table4":
        models = ("compressive", "adaptive_span", "expire_span")
        fused = {"keep_prob": options.keep_prob[0], "variant": "fused"}
        return [
            {**common, **fused, **task_sizes, "task": f"{task}, {model}", "model": model}
            for task, task_sizes in TABLE4.items()
            for model in models
        ]
    if options.preset == "cpu":
        models_and_probs = [("trans_xl", 1.0), ("adaptive_span", 0.25), ("compressive", 1.0)]
        models_and_probs += [("expire_span", 0.25), ("expire_span", 1.0)]
        rows = [(model, prob, 1024, variant) for model, prob in models_and_probs for variant in ("fused", "reference")]
        rows += [("trans_xl", 1.0, 1024, "sdpa"), *(("expire_span", prob, 1024, "compiled") for prob in (0.25, 1.0))]
    elif options.preset == "span":
        rows = [("trans_xl", 1.0, span, variant) for span in (1024, 4096, 16384) for variant in ("fused", "sdpa")]
        rows += [("trans_xl", 1.0, span, "reference") for span in (1024, 4096)]
        rows += [("expire_span", 500 / span, span, "fused") for span in (1024, 4096, 16384, 65536, 262_144)]
        rows += [("expire_span", 500 / span, span, "reference") for span in (4096, 65536)]
    else:
        rows = []
        for span in options.span:
            for prob in [options.num_memories / span] if options.num_memories else options.keep_prob:
                rows += [(options.model, prob, span, variant) for variant in options.variants]
    names = ("model", "keep_prob", "span", "variant")
    return [{**common, **sizes, **dict(zip(names, row, strict=True))} for row in rows]


def predict(case: dict[str, Any], device: Device) -> str:
    """What the cost model says of a case in bfloat16, in one line."""
    kept_fractions = {"trans_xl": 1.0, "compressive": 7 / 16}  # see `bench_step.build_mechanism`
    num_memories = case["span"] * kept_fractions.get(case["model"], case["keep_prob"])
    num_positions = case["block_size"] if case["model"] == "expire_span" else case["span"]
    cost = step_cost(case, num_memories, num_positions, "bfloat16")
    parts = ", ".join(f"{name} {count / 1e12:.3g}" for name, count in cost.operations().items())
    total = sum(cost.operations().values()) / 1e12
    name = case.get("task") or case["model"]
    roofline = cost.roofline_seconds(device.flops["bfloat16"], device.bandwidth)
    return (
        f"{name}, span {case['span']:,}, {num_memories:,.0f} memories, batch {case['batch_size']}: "
        f"{total:.3g} TFLOP ({parts}), {cost.bytes_moved() / 1e9:.3g} GB moved, "
        f"roofline {1000 * roofline:.3g} ms at the published peak of {device.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "span", "table4"), help="cpu: a table; span: a figure")
    parser.add_argument("--model", default="expire_span", choices=MODEL_NAMES)
    variants_help = "compiled: fused, with torch.compile for everything but the attention; sdpa, flex and varlen: "
    variants_help += "torch's own attentions, see bench_attention.py"
    variants = ["fused", "reference"]
    parser.add_argument("--variants", nargs="+", default=variants, choices=VARIANTS, help=variants_help)
    parser.add_argument("--span", type=int, nargs="+", default=[1024], help="L, timesteps")
    parser.add_argument("--keep-prob", type=float, nargs="+", default=[0.25], help="probability that a memory survives")
    parser.add_argument("--num-memories", type=int, help="instead of --keep-prob: their number, whatever the span")
    for name, value in CPU_SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"(default {value})")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--predict", action="store_true", help="print operations, bytes and roofline of the cost model")
    parser.add_argument("--folder", type=Path, help="where NAME.json, NAME.md and, with --preset span, NAME.png go")
    options = parser.parse_args()
    preset_options = {"model", "variants", "span", "num_memories"}
    preset_options |= set(CPU_SIZES) if options.preset == "table4" else {"keep_prob"}
    ignored = sorted(name for name in preset_options if getattr(options, name) != parser.get_default(name))
    if options.preset and ignored:
        parser.error(f"--preset {options.preset} has values of its own for {', '.join(ignored)}; omit them")
    if "flex" in options.variants and options.device == "cpu":
        parser.error("the variant flex needs --device cuda: torch has no gradients of it on a CPU")
    if "varlen" in options.variants and (options.device, options.precision) != ("cuda", "bfloat16"):
        parser.error("the variant varlen needs --device cuda and --precision bfloat16")
    cases = build_cases(options)
    if options.predict:
        for case in cases:
            print(predict(case, DEVICES["h100"]))
        return
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{options.device}, {options.num_threads} thread"
    )
    sizes_by_task = {
        case.get("task", "").partition(",")[
            0
        ]: "{num_layers} layers of d {hidden_size}, blocks of {block_size}".format_map(case)
        for case in cases
    }
    sizes = "; ".join(f"{task}: {sizes}" if task else sizes for task, sizes in sizes_by_task.items())
    lines = [f"A training step on {device}: {options.batch_size} streams, {options.precision}; {sizes}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    print("\n".join(lines))
    results = []
    for case in cases:
        results.append(measure_in_subprocess(case))
        lines.append(table_row(results[-1]))
        print(lines[-1], flush=True)
    lines += ["", *(f"- {ratio}" for ratio in ratios(results))]
    print("\n".join(lines[len(cases) + 4 :]))
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        path = options.folder / (options.preset or options.model)
        origin = provenance(sys.argv)
        lines += ["", f"`{origin['command']}`, {json.dumps(origin['versions'])}, commit {origin['commit']}"]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
        content = {"provenance": origin, "device": device, "cases": results}
        path.with_suffix(".json").write_text(json.dumps(content, indent=1))
        if options.preset == "span":
            plot(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
