"""Time and memory of a training step: ours, its plain definition, and scaled_dot_product_attention over the full span.

    make bench                                                        the CPU table and the figure, into results/bench/
    python scripts/bench.py --model expire_span --span 4096 65536 --survivors 500
    python scripts/bench.py --preset table4 --device cuda --precision bfloat16 --batch 8
    python scripts/bench.py --model expire_span --span 16384 --kept 0.1 --predict      counts, and runs nothing

The streams are random tokens. A memory of Expire-Span is kept by lot, scattered over the span, so that the share that
survives is as asked for; the span predictor runs as ever. Every case is a process of its own, one after another; a step
is one block forward and backward from the same full memory. Times are medians, with the quartiles beside them.
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
from cost_model import H100, Device, Step
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import expire_span.transformer as transformer
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.attention import samples_of
from expire_span.kernels import operator
from expire_span.memory.mechanism import Mechanism
from expire_span.memory.packed import Memory, dense, join, select
from expire_span.runner.build import keep_freed_memory
from expire_span.runner.measures import peak_memory, reset_peak_memory
from expire_span.runner.record import provenance

CPU_SIZES = {"layers": 4, "hidden": 128, "heads": 4, "feedforward": 512, "vocabulary": 256, "block": 64, "ramp": 64}
SIZES = ("layers", "hidden", "heads", "feedforward", "vocabulary", "batch", "block")  # of the cost model
TABLE4: dict[str, dict[str, int]] = {  # the paper's sizes; for instruction our built-in world's vocabulary
    "instruction": {"layers": 6, "hidden": 512, "heads": 8, "feedforward": 2048, "vocabulary": 300, "block": 512,
                    "ramp": 64, "span": 16384},
    "collision": {"layers": 6, "hidden": 512, "heads": 4, "feedforward": 1024, "vocabulary": 84, "block": 256,
                  "ramp": 128, "span": 16384, "pre_norm": True},
    "enwik8": {"layers": 12, "hidden": 512, "heads": 8, "feedforward": 2048, "vocabulary": 256, "block": 512,
               "ramp": 128, "span": 16384},
    "pg19": {"layers": 12, "hidden": 512, "heads": 8, "feedforward": 2048, "vocabulary": 3507, "block": 512,
             "ramp": 128, "span": 16384},
}  # fmt: skip


class ByLot(ExpireSpan):
    """Spans of L for the timesteps that a lot has chosen, of 1 for all others."""

    chosen: Tensor  # (B, L + T) bool, from timestep -L on

    def span(self, memory: Memory) -> Tensor:
        chosen = self.chosen[samples_of(memory.offsets, len(memory.time)), memory.time + self.max_span]  # (N,)
        return super().span(memory) * 0 + (1 + chosen * (self.max_span - 1.0))[:, None]


def mechanism(case: dict[str, Any]) -> Mechanism:
    span, ramp = case["span"], case["ramp"]
    if case["model"] == "trans_xl":
        return TransXL(span)
    if case["model"] == "adaptive_span":  # a share `kept` of the span
        return AdaptiveSpan(case["heads"], span, ramp, 1e-6, init=case["kept"])
    if case["model"] == "compressive":  # a quarter of the span as it is, the rest pooled by four
        return Compressive(span // 4, span * 3 // 16, 4)
    drawn = ByLot(case["hidden"], span, ramp, 1e-6, positions=case["block"])
    drawn.register_buffer("chosen", torch.rand(case["batch"], span + case["block"]) < case["kept"])
    return drawn


def full_memory(memory: Mechanism, case: dict[str, Any], device: torch.device) -> Memory:
    """What a layer remembers after a long time: random hidden states, at the times that survive."""
    batch, size = case["batch"], case["hidden"]
    past = torch.arange(-memory.max_span, 0, device=device)
    if isinstance(memory, ByLot):
        alive = memory.chosen[:, : memory.max_span]  # (B, L)
        offsets = torch.cat([past.new_zeros(1), alive.sum(1).cumsum(0)])
        time_ = past.expand(batch, -1)[alive]  # (N,)
        return Memory(torch.randn(len(time_), size, device=device), time_, torch.ones_like(time_), offsets)
    hidden = torch.randn(batch, len(past), size, device=device)
    if isinstance(memory, Compressive):
        pooled = -memory.max_span - 1 - memory.rate * torch.arange(memory.compressed, 0, -1, device=device)
        old = dense(torch.randn(batch, memory.compressed, size, device=device), pooled, born=memory.max_span + 1)
        return join(old, dense(hidden, past))
    everything = dense(hidden, past)
    alive = memory.span(everything).amax(1) + memory.ramp > -everything.time  # (N,)
    return select(everything, alive)


def sdpa(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **fading: Any) -> Tensor:
    """What one would take instead: torch's own attention over the whole span, with a mask, and without positions."""
    key, value = (each.unflatten(0, (len(query), -1)).transpose(1, 2) for each in (key, value))  # (B, H, S, D)
    age = fading["age"].unflatten(0, (len(query), -1))[0]  # (S,)
    distance = age + torch.arange(query.shape[2], device=age.device)[:, None]  # (T, S)
    seen = (distance >= 1) & (distance <= fading["span"].max())
    return scaled_dot_product_attention(query, key, value, attn_mask=seen)


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """One case: its times, memory and operations, in this process."""
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    device = torch.device(case["device"])
    kernel = "definition" if case["form"] == "definition" else "auto"
    sizes = (case["vocabulary"], case["hidden"], case["heads"], case["feedforward"])
    pre_norm = case.get("pre_norm", False)
    config = TransformerConfig(*sizes, kernel=kernel, recompute=case["recompute"], pre_norm=pre_norm)
    model = Transformer(config, [mechanism(case) for _ in range(case["layers"])]).to(device)
    if case["form"] == "sdpa":
        transformer.packed_span_attention = lambda *given, kernel, **fading: sdpa(*given, **fading)
    state: dict[str, Any] = {"now": torch.zeros((), dtype=torch.long, device=device)}
    state |= {"layers": [full_memory(each, case, device) for each in model.mechanisms]}
    tokens = torch.randint(case["vocabulary"], (case["batch"], case["block"]), device=device)

    forward = torch.compile(model, dynamic=True) if case["form"] == "compiled" else model

    def step(tokens: Tensor = tokens, state: dict[str, Any] = state) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case["precision"] == "bfloat16"):
            scores, _, figures = forward(tokens, state)
        loss = cross_entropy(scores.float().flatten(0, 1), tokens.flatten()) + figures["span_loss"]
        loss.backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()  # loads and compiles what is loaded and compiled on first use
    give_back()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
    reset_peak_memory(device)
    step()
    peak = next(iter(peak_memory(device).values())) * 1e9 - before
    times = timed(step, case["repeats"], device)
    saved = saved_bytes(step, [*model.parameters(), *(memory.hidden for memory in state["layers"])])
    survivors = sum(len(memory.time) for memory in state["layers"]) / case["layers"] / case["batch"]
    positions = max(each.positions for each in model.mechanisms)
    cost = Step(**{name: case[name] for name in SIZES}, survivors=survivors, positions=positions, pre_norm=pre_norm)
    operations = sum(cost.operations().values())
    machine = Device("this machine", product_rate(device, case["precision"]), float("inf"))
    middle = statistics.median(times)
    return {
        **case,
        "kernel": operator.form(kernel, device.type, torch.float32),
        "survivors": survivors,
        "ms": 1000 * middle,
        "ms_quartiles": [1000 * each for each in statistics.quantiles(times, n=4)[::2]],
        "tokens_per_second": case["batch"] * case["block"] / middle,
        "peak_mb": peak / 1e6,
        "saved_mb": saved / 1e6,
        "gflops": operations / middle / 1e9,
        "machine_gflops": machine.flops / 1e9,
        "over_floor": middle / cost.floor(machine),
    }


def saved_bytes(step: Callable[[], object], known: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, beyond those of the known tensors."""
    kept: dict[int, int] = {tensor.untyped_storage().data_ptr(): 0 for tensor in known}

    def count(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step()
    return sum(kept.values())


def timed(step: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call, by device events on CUDA; two calls before them warm up."""
    seconds = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            finish.record()
            torch.cuda.synchronize()
            lap = begin.elapsed_time(finish) / 1000
        else:
            start = time.perf_counter()
            step()
            lap = time.perf_counter() - start
        if number >= 2:
            seconds.append(lap)
    return seconds


def product_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: one @ other, 8, device))


def give_back() -> None:
    """Gives freed memory back to the system, so that its use again counts towards a peak; where there is a glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0.0


def fresh(case: dict[str, Any]) -> dict[str, Any]:
    """`measured` in a process of its own, so that no case inherits another's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, case).result()


OURS = ("fused", "compiled")
COLUMNS = ["model", "form", "span", "survivors", "ms (quartiles)", "tokens/s", "saved MB", "peak MB", "GFLOP/s",
           "of a large product's", "x floor"]  # fmt: skip


def row(found: dict[str, Any]) -> str:
    low, high = found["ms_quartiles"]
    cells = [
        found.get("task") or found["model"],
        f"{found['form']}, {found['kernel']}" if found["form"] in OURS else found["form"],
        f"{found['span']:,}",
        f"{found['survivors']:.0f}",
        f"{found['ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{found['tokens_per_second']:.0f}",
        f"{found['saved_mb']:.1f}",
        f"{found['peak_mb']:.0f}",
        f"{found['gflops']:.0f}",
        f"{100 * found['gflops'] / found['machine_gflops']:.0f}%",
        f"{found['over_floor']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def ratios(found: list[dict[str, Any]]) -> list[str]:
    """How many times less our forms take than the plain definition in the same run."""
    lines = []
    for ours in found:
        for other in found:
            same = all(ours[key] == other[key] for key in ("model", "span", "kept", "batch", "hidden"))
            if ours["form"] in OURS and other["form"] == "definition" and same:
                name = f"{ours['model']}, {ours['form']}, span {ours['span']:,}, {ours['survivors']:.0f} survivors"
                less = [other[key] / ours[key] for key in ("ms", "saved_mb", "peak_mb")]
                words = ("x less time", "x fewer saved bytes", "x less peak memory")
                lines.append(", ".join([name, *(f"{each:.2f} {word}" for each, word in zip(less, words, strict=True))]))
    return lines


NAMES = {"trans_xl": "Transformer-XL", "expire_span": "Expire-Span", "adaptive_span": "Adaptive-Span"}
NAMES["compressive"] = "Compressive"
FORMS = {"fused": "fused", "compiled": "fused and compiled", "definition": "plain definition"}
FORMS["sdpa"] = "torch's own attention, no positions"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Time and bytes saved for backward, against the span."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        few = f", about {round(each['survivors'], -2):.0f} survivors" if each["model"] == "expire_span" else ""
        curves.setdefault(f"{NAMES[each['model']]}{few}: {FORMS[each['form']]}", []).append(each)
    for name, points in sorted(curves.items()):
        points.sort(key=lambda each: each["span"])
        spans = [each["span"] for each in points]
        style = {"color": "#d1495b" if name.startswith("Expire") else "#2b6777", "label": name}
        style |= {"linestyle": dict(zip(FORMS, ("-", "-.", ":", "--"), strict=True))[points[0]["form"]]}
        for axis, key in zip(axes, ("ms", "saved_mb"), strict=True):
            axis.plot(spans, [each[key] for each in points], marker="o", markersize=3, **style)
    for axis, label in zip(axes, ("ms a training step", "MB saved for the backward pass"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="maximum span L, timesteps", ylabel=label)
        spans = sorted({each["span"] for each in found})
        axis.set_xticks(spans, [f"{span:,}" for span in spans])
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"device": options.device, "precision": options.precision, "threads": options.threads}
    common |= {"repeats": options.repeats, "batch": options.batch, "recompute": options.recompute}
    sizes = CPU_SIZES | {name: value for name in CPU_SIZES if (value := getattr(options, name)) is not None}
    if options.preset == "table4":
        models = ("compressive", "adaptive_span", "expire_span")
        kept = options.kept[0]
        return [
            {**common, **each, "task": f"{task}, {model}", "model": model, "kept": kept, "form": "fused"}
            for task, each in TABLE4.items()
            for model in models
        ]
    if options.preset == "cpu":
        wanted = [("trans_xl", 1.0), ("adaptive_span", 0.25), ("compressive", 1.0), ("expire_span", 0.25),
                  ("expire_span", 1.0)]  # fmt: skip
        table = [(model, kept, 1024, form) for model, kept in wanted for form in ("fused", "definition")]
        table += [("trans_xl", 1.0, 1024, "sdpa"), *(("expire_span", kept, 1024, "compiled") for kept in (0.25, 1.0))]
        return [{**common, **sizes, "model": m, "kept": k, "span": s, "form": f} for m, k, s, f in table]
    if options.preset == "span":
        short = [("trans_xl", 1.0, span, form) for span in (1024, 4096, 16384) for form in ("fused", "sdpa")]
        short += [("trans_xl", 1.0, span, "definition") for span in (1024, 4096)]
        long = [("expire_span", 500 / span, span, "fused") for span in (1024, 4096, 16384, 65536, 262_144)]
        also = [("expire_span", 500 / span, span, "definition") for span in (4096, 65536)]
        return [{**common, **sizes, "model": m, "kept": k, "span": s, "form": f} for m, k, s, f in short + long + also]
    chosen = []
    for span in options.span:
        for kept in [options.survivors / span] if options.survivors else options.kept:
            chosen += [{**common, **sizes, "model": options.model, "kept": kept, "span": span, "form": form}
                       for form in options.forms]  # fmt: skip
    return chosen


def predicted(case: dict[str, Any], device: Device) -> str:
    shares = {"trans_xl": 1.0, "compressive": 7 / 16}  # see `mechanism`
    survivors = case["span"] * shares.get(case["model"], case["kept"])
    positions = case["block"] if case["model"] == "expire_span" else case["span"]
    sizes = {name: case[name] for name in SIZES}
    pre_norm = case.get("pre_norm", False)
    cost = Step(**sizes, survivors=survivors, positions=positions, bytes_each=2, pre_norm=pre_norm)
    parts = ", ".join(f"{name} {each / 1e12:.3g}" for name, each in cost.operations().items())
    total = sum(cost.operations().values()) / 1e12
    name = case.get("task") or case["model"]
    return (
        f"{name}, span {case['span']:,}, {survivors:,.0f} survivors, batch {case['batch']}: "
        f"{total:.3g} TFLOP ({parts}), {cost.bytes() / 1e9:.3g} GB moved, floor {1000 * cost.floor(device):.3g} ms "
        f"on {device.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "span", "table4"), help="cpu: a table; span: a figure")
    parser.add_argument("--model", default="expire_span", help="expire_span, trans_xl, adaptive_span or compressive")
    parser.add_argument("--forms", nargs="+", default=["fused", "definition"], choices=FORMS,
                        help="compiled: fused, and torch.compile for what is not attention")  # fmt: skip
    parser.add_argument("--span", type=int, nargs="+", default=[1024], help="L, timesteps")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.25], help="share of the memories that survives")
    parser.add_argument("--survivors", type=int, help="instead of --kept: their number, whatever the span")
    for name, value in CPU_SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"(default {value})")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--recompute", action="store_true", help="layers again in the backward pass")
    parser.add_argument("--predict", action="store_true", help="operations, bytes and floor by the cost model alone")
    parser.add_argument("--folder", type=Path, help="where NAME.json, NAME.md and, with --preset span, NAME.png go")
    options = parser.parse_args()
    own = {"model", "forms", "span", "survivors", *(CPU_SIZES if options.preset == "table4" else ["kept"])}
    ignored = sorted(name for name in own if getattr(options, name) != parser.get_default(name))
    if options.preset and ignored:
        parser.error(f"--preset {options.preset} has values of its own for {', '.join(ignored)}; leave them away")
    chosen = cases(options)
    if options.predict:
        for case in chosen:
            print(predicted(case, H100))
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.device}, {options.threads} thread"
    of = {case.get("task", "").partition(",")[0]: f"{case['layers']} layers of d {case['hidden']}, blocks of "
          f"{case['block']}" for case in chosen}  # fmt: skip
    words = "; ".join(f"{task}: {each}" if task else each for task, each in of.items())
    lines = [f"A training step on {device}: {options.batch} streams, {options.precision}; {words}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    print("\n".join(lines))
    found = []
    for case in chosen:
        found.append(fresh(case))
        lines.append(row(found[-1]))
        print(lines[-1], flush=True)
    lines += ["", *(f"- {each}" for each in ratios(found))]
    print("\n".join(lines[len(chosen) + 4 :]))
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        path = options.folder / (options.preset or options.model)
        about = provenance(sys.argv)
        lines += ["", f"`{about['command']}`, {json.dumps(about['versions'])}, commit {about['commit']}"]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")
        path.with_suffix(".json").write_text(json.dumps({"about": about, "device": device, "cases": found}, indent=1))
        if options.preset == "span":
            draw(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
