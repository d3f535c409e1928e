"""Time and memory of a training step: fused attention, its plain reference, and scaled_dot_product_attention.

    make bench                                                        the CPU table and the figure, into results/bench/
    python scripts/bench.py --model expire_span --span 4096 65536 --num-memories 500
    python scripts/bench.py --preset table4 --device cuda --precision bfloat16 --batch-size 8
    python scripts/bench.py --model expire_span --span 16384 --keep-prob 0.1 --predict     counts, and runs nothing

The streams are random tokens. Each memory of Expire-Span survives with a given probability, independently of its age,
and the span predictor runs as usual. Every case runs in a process of its own, one after another; a step is one block
forward and backward from the same full memory. Times are medians, with their quartiles.
"""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cost_model import H100, Device, TrainStepCost
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import expire_span.memory_attention as memory_attention
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.kernels.dispatch import select_backend
from expire_span.kernels.packed_layout import sample_index
from expire_span.memory.mechanism import Mechanism
from expire_span.memory.packed import Memory, concatenate, from_dense, keep_rows
from expire_span.runner.build import keep_freed_memory
from expire_span.runner.logging.performance import peak_memory, reset_peak_memory
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
SIZES = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "feedforward_size",
    "vocab_size",
    "batch_size",
    "block_size",
)  # of the cost model
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


class RandomSurvival(ExpireSpan):
    """Spans of L for randomly chosen timesteps, of 1 for all others."""

    survives: Tensor  # (B, L + T) bool, from timestep -L on

    def span(self, memory: Memory) -> Tensor:
        samples = sample_index(memory.offsets, len(memory.time))  # (N,)
        survives = self.survives[samples, memory.time + self.max_span]  # (N,)
        return super().span(memory) * 0 + (1 + survives * (self.max_span - 1.0))[:, None]


def build_mechanism(case: dict[str, Any]) -> Mechanism:
    span, ramp = case["span"], case["ramp"]
    if case["model"] == "trans_xl":
        return TransXL(span)
    if case["model"] == "adaptive_span":
        return AdaptiveSpan(case["num_heads"], span, ramp, 1e-6, init_span_ratio=case["keep_prob"])
    if case["model"] == "compressive":  # a quarter of the span is uncompressed, the rest pooled by four
        return Compressive(span // 4, span * 3 // 16, 4)
    mechanism = RandomSurvival(case["hidden_size"], span, ramp, 1e-6, num_positions=case["block_size"])
    mechanism.register_buffer("survives", torch.rand(case["batch_size"], span + case["block_size"]) < case["keep_prob"])
    return mechanism


def full_memory(mechanism: Mechanism, case: dict[str, Any], device: torch.device) -> Memory:
    """A layer's memory after a long time: random hidden states at the timesteps that survive."""
    batch, size = case["batch_size"], case["hidden_size"]
    past = torch.arange(-mechanism.max_span, 0, device=device)
    if isinstance(mechanism, RandomSurvival):
        alive = mechanism.survives[:, : mechanism.max_span]  # (B, L)
        offsets = torch.cat([past.new_zeros(1), alive.sum(1).cumsum(0)])
        time_ = past.expand(batch, -1)[alive]  # (N,)
        return Memory(torch.randn(len(time_), size, device=device), time_, torch.ones_like(time_), offsets)
    hidden = torch.randn(batch, len(past), size, device=device)
    if isinstance(mechanism, Compressive):
        slots = torch.arange(mechanism.compressed_size, 0, -1, device=device)
        pooled_time = -mechanism.max_span - 1 - mechanism.compression_rate * slots
        pooled_hidden = torch.randn(batch, len(slots), size, device=device)
        pooled = from_dense(pooled_hidden, pooled_time, min_distance=mechanism.max_span + 1)
        return concatenate(pooled, from_dense(hidden, past))
    memory = from_dense(hidden, past)
    alive = mechanism.span(memory).amax(1) + mechanism.ramp > -memory.time  # (N,)
    return keep_rows(memory, alive)


def sdpa(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **mask_inputs: Any) -> Tensor:
    """The obvious alternative: torch's own attention over the whole span, with a mask and without positions."""
    key, value = (packed.unflatten(0, (len(query), -1)).transpose(1, 2) for packed in (key, value))  # (B, H, S, D)
    age = mask_inputs["age"].unflatten(0, (len(query), -1))[0]  # (S,)
    distance = age + torch.arange(query.shape[2], device=age.device)[:, None]  # (T, S)
    visible = (distance >= 1) & (distance <= mask_inputs["span"].max())
    return scaled_dot_product_attention(query, key, value, attn_mask=visible)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Time, memory and operations of one case, in this process."""
    torch.set_num_threads(case["num_threads"])
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    device = torch.device(case["device"])
    backend = "reference" if case["variant"] == "reference" else "auto"
    sizes = (case["vocab_size"], case["hidden_size"], case["num_heads"], case["feedforward_size"])
    pre_norm = case.get("pre_norm", False)
    backend_options = {"attention_backend": backend, "activation_checkpointing": case["activation_checkpointing"]}
    config = TransformerConfig(*sizes, pre_norm=pre_norm, **backend_options)
    model = Transformer(config, [build_mechanism(case) for _ in range(case["num_layers"])]).to(device)
    if case["variant"] == "sdpa":
        memory_attention.packed_span_attention = lambda *inputs, backend, **mask_inputs: sdpa(*inputs, **mask_inputs)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.long, device=device)}
    state |= {"layers": [full_memory(mechanism, case, device) for mechanism in model.mechanisms]}
    tokens = torch.randint(case["vocab_size"], (case["batch_size"], case["block_size"]), device=device)

    forward = torch.compile(model, dynamic=True) if case["variant"] == "compiled" else model

    def step(tokens: Tensor = tokens, state: dict[str, Any] = state) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case["precision"] == "bfloat16"):
            logits, _, metrics = forward(tokens, state)
        loss = cross_entropy(logits.float().flatten(0, 1), tokens.flatten()) + metrics["span_loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()  # loads and compiles whatever is loaded and compiled on first use
    malloc_trim()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else rss_bytes()
    reset_peak_memory(device)
    step()
    peak = next(iter(peak_memory(device).values())) * 1e9 - before
    times = time_calls(step, case["repeats"], device)
    saved = saved_bytes(step, [*model.parameters(), *(memory.hidden for memory in state["layers"])])
    num_memories = sum(len(memory.time) for memory in state["layers"]) / case["num_layers"] / case["batch_size"]
    num_positions = max(mechanism.num_positions for mechanism in model.mechanisms)
    sizes_of_cost = {name: case[name] for name in SIZES}
    cost = TrainStepCost(**sizes_of_cost, num_memories=num_memories, num_positions=num_positions, pre_norm=pre_norm)
    operations = sum(cost.operations().values())
    machine = Device("this machine", matmul_rate(device, case["precision"]), float("inf"))
    median = statistics.median(times)
    return {
        **case,
        "backend": select_backend(backend, device.type, torch.float32),
        "num_memories": num_memories,
        "ms": 1000 * median,
        "ms_quartiles": [1000 * quartile for quartile in statistics.quantiles(times, n=4)[::2]],
        "tokens_per_second": case["batch_size"] * case["block_size"] / median,
        "peak_mb": peak / 1e6,
        "saved_mb": saved / 1e6,
        "gflops": operations / median / 1e9,
        "machine_gflops": machine.flops / 1e9,
        "over_roofline": median / cost.roofline_seconds(machine),
    }


def saved_bytes(step: Callable[[], object], excluded: list[Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, counting each storage once and leaving out some tensors."""
    saved: dict[int, int] = {tensor.untyped_storage().data_ptr(): 0 for tensor in excluded}

    def count(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step()
    return sum(saved.values())


def time_calls(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call, by device events on CUDA, after two calls for warm-up."""
    seconds = []
    for call in range(repeats + 2):
        if device.type == "cuda":
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            step()
            end_event.record()
            torch.cuda.synchronize()
            elapsed = start_event.elapsed_time(end_event) / 1000
        else:
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
        if call >= 2:
            seconds.append(elapsed)
    return seconds


def matmul_rate(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: a @ b, 8, device))


def malloc_trim() -> None:
    """Return freed memory to the system, where glibc is used, so that its next use counts towards the peak."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss_bytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0.0


def measure_in_subprocess(case: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own, so that no case inherits another's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


FUSED = ("fused", "compiled")
COLUMNS = ["model", "variant", "span", "memories", "ms (quartiles)", "tokens/s", "saved MB", "peak MB", "GFLOP/s",
           "of a large matmul's", "x roofline"]  # fmt: skip


def table_row(result: dict[str, Any]) -> str:
    low, high = result["ms_quartiles"]
    cells = [
        result.get("task") or result["model"],
        f"{result['variant']}, {result['backend']}" if result["variant"] in FUSED else result["variant"],
        f"{result['span']:,}",
        f"{result['num_memories']:.0f}",
        f"{result['ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{result['tokens_per_second']:.0f}",
        f"{result['saved_mb']:.1f}",
        f"{result['peak_mb']:.0f}",
        f"{result['gflops']:.0f}",
        f"{100 * result['gflops'] / result['machine_gflops']:.0f}%",
        f"{result['over_roofline']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def ratios(results: list[dict[str, Any]]) -> list[str]:
    """How many times less the fused variants take than the reference in the same run."""
    lines = []
    for fused in results:
        for reference in results:
            same_case = all(
                fused[key] == reference[key] for key in ("model", "span", "keep_prob", "batch_size", "hidden_size")
            )
            if fused["variant"] in FUSED and reference["variant"] == "reference" and same_case:
                case = f"{fused['model']}, {fused['variant']}, span {fused['span']:,}"
                memories = f"{fused['num_memories']:.0f} memories"
                time_ratio, saved_ratio, peak_ratio = (reference[key] / fused[key] for key in RATIO_KEYS)
                lines.append(
                    f"{case}, {memories}, {time_ratio:.2f} x less time, {saved_ratio:.2f} x fewer saved bytes, "
                    f"{peak_ratio:.2f} x less peak memory"
                )
    return lines


RATIO_KEYS = ("ms", "saved_mb", "peak_mb")
MODEL_NAMES = {
    "trans_xl": "Transformer-XL",
    "expire_span": "Expire-Span",
    "adaptive_span": "Adaptive-Span",
    "compressive": "Compressive",
}
VARIANTS = {
    "fused": "fused",
    "compiled": "fused and compiled",
    "reference": "plain reference",
    "sdpa": "torch's own attention, no positions",
}
LINE_STYLES = dict(zip(VARIANTS, ("-", "-.", ":", "--"), strict=True))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Time and bytes saved for the backward pass, against the span."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        is_expire_span = result["model"] == "expire_span"
        memories = f", about {round(result['num_memories'], -2):.0f} memories" if is_expire_span else ""
        label = f"{MODEL_NAMES[result['model']]}{memories}: {VARIANTS[result['variant']]}"
        curves.setdefault(label, []).append(result)
    for label, points in sorted(curves.items()):
        points.sort(key=lambda result: result["span"])
        spans = [result["span"] for result in points]
        color = "#d1495b" if label.startswith("Expire") else "#2b6777"
        style = {"color": color, "label": label, "linestyle": LINE_STYLES[points[0]["variant"]]}
        for axis, key in zip(axes, ("ms", "saved_mb"), strict=True):
            axis.plot(spans, [result[key] for result in points], marker="o", markersize=3, **style)
    for axis, label in zip(axes, ("ms per training step", "MB saved for the backward pass"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="maximum span L, timesteps", ylabel=label)
        spans = sorted({result["span"] for result in results})
        axis.set_xticks(spans, [f"{span:,}" for span in spans])
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


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
    """What the cost model says of a case, in one line."""
    kept_fractions = {"trans_xl": 1.0, "compressive": 7 / 16}  # see `build_mechanism`
    num_memories = case["span"] * kept_fractions.get(case["model"], case["keep_prob"])
    num_positions = case["block_size"] if case["model"] == "expire_span" else case["span"]
    sizes = {name: case[name] for name in SIZES}
    dtype_and_norm = {"bytes_per_number": 2, "pre_norm": case.get("pre_norm", False)}
    cost = TrainStepCost(**sizes, num_memories=num_memories, num_positions=num_positions, **dtype_and_norm)
    parts = ", ".join(f"{name} {count / 1e12:.3g}" for name, count in cost.operations().items())
    total = sum(cost.operations().values()) / 1e12
    name = case.get("task") or case["model"]
    return (
        f"{name}, span {case['span']:,}, {num_memories:,.0f} memories, batch {case['batch_size']}: "
        f"{total:.3g} TFLOP ({parts}), "
        f"{cost.bytes() / 1e9:.3g} GB moved, roofline {1000 * cost.roofline_seconds(device):.3g} ms on {device.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "span", "table4"), help="cpu: a table; span: a figure")
    parser.add_argument("--model", default="expire_span", choices=MODEL_NAMES)
    compiled_help = "compiled: fused, with torch.compile for everything but the attention"
    variants = ["fused", "reference"]
    parser.add_argument("--variants", nargs="+", default=variants, choices=VARIANTS, help=compiled_help)
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
    cases = build_cases(options)
    if options.predict:
        for case in cases:
            print(predict(case, H100))
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
