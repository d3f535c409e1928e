"""One training step with random memories, in a process of its own: its time, its memory and its operations."""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from bench_attention import ATTENTIONS
from torch import Tensor
from torch.nn.functional import cross_entropy

import expire_span.memory_attention as memory_attention
from expire_span import AdaptiveSpan, Compressive, ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.kernels.dispatch import select_backend
from expire_span.kernels.packed_layout import sample_index
from expire_span.memory.mechanism import Mechanism
from expire_span.memory.packed import Memory, concatenate, from_dense, keep_rows, with_max_age
from expire_span.runner.build import keep_freed_memory
from expire_span.runner.cost_model import matmul_flops
from expire_span.runner.logging.performance import peak_memory, reset_peak_memory
from expire_span.runner.step_cost import StepCost


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
    if case["variant"] in ATTENTIONS:
        attention = ATTENTIONS[case["variant"]]
        memory_attention.packed_span_attention = lambda *inputs, backend, **others: attention(*inputs, **others)
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.long, device=device)}
    memories = [full_memory(mechanism, case, device) for mechanism in model.mechanisms]
    state["layers"] = [with_max_age(memory, state["step"]) for memory in memories]  # as a model's own memories know it
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
    cost = step_cost(case, num_memories, num_positions, case["precision"])
    operations = sum(cost.operations().values())
    machine_flops = matmul_flops(device, case["precision"])
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
        "machine_gflops": machine_flops / 1e9,
        "over_roofline": median / cost.roofline_seconds(machine_flops, float("inf")),
    }


def step_cost(case: dict[str, Any], num_memories: float, num_positions: int, precision: str) -> StepCost:
    """The cost model of a case."""
    sizes = (case["vocab_size"], case["hidden_size"], case["num_heads"], case["feedforward_size"])
    transformer = TransformerConfig(*sizes, pre_norm=case.get("pre_norm", False))
    shape = (case["num_layers"], case["batch_size"], case["block_size"], num_memories, num_positions)
    return StepCost(transformer, *shape, precision=precision)


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
