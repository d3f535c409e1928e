"""How fast the tasks are on their own: environments, rollouts, simulations of collision, and reading text.

envs        environment steps per second, with random actions, observations included
collision   timesteps generated per second
text        share of a training step (size=mini) that reading its batch takes
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from expire_span import ExpireSpan, Transformer, TransformerConfig
from expire_span.tasks.collision import Collision
from expire_span.tasks.corridor import Corridor
from expire_span.tasks.gridworld import Gridworld
from expire_span.tasks.portal import Portal
from expire_span.tasks.text import Text

ENV_STEPS = 500  # per repeat


def time_calls(call: Callable[[], object], repeats: int, device: str = "cpu") -> list[float]:
    """Seconds of each call, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def report(name: str, values: list[float], unit: str) -> None:
    median, low, high = statistics.median(values), min(values), max(values)
    print(f"{name:34} {median:10,.0f} {unit} (median; {low:,.0f} to {high:,.0f})", flush=True)


def random_steps(task: Gridworld, num_envs: int, device: str) -> Callable[[], object]:
    envs = task.make_envs(num_envs, device)
    actions = torch.randint(task.num_actions, (ENV_STEPS, num_envs), device=device)

    def run() -> None:
        for action in actions:
            envs.step(action)
            envs.observe()

    return run


def reading_share(repeats: int) -> list[float]:
    """Percentage of a training step of `task=text size=mini` that reading its batch takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(np.random.default_rng(0).integers(256, size=4_000_000, dtype=np.uint8).tobytes())
        stream = Text(path).stream("train", batch_size=16, block_size=64)
        config = TransformerConfig(256, 96, 2, 384, pre_norm=True)
        model = Transformer(config, [ExpireSpan(96, 512, 32, 1e-6, num_positions=64) for _ in range(2)])
        state = model.initial_state(16)
        shares = []
        for _ in range(repeats):
            start = time.perf_counter()
            batch = next(stream)
            reading = time.perf_counter() - start
            logits, state, metrics = model(batch.tokens, state)
            losses = model.output_head.token_losses(logits.flatten(0, 1), batch.targets.flatten())
            (losses.mean() + metrics["span_loss"]).backward()
            shares.append(100 * reading / (time.perf_counter() - start))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--num-threads", type=int, default=1, help="of the CPU; more do not help environments this small"
    )
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    print(f"{options.num_envs} environments, {options.device}, threads: {options.num_threads}")
    for task in (Corridor(), Portal()):
        name = type(task).__name__.lower()
        seconds = time_calls(random_steps(task, options.num_envs, options.device), options.repeats, options.device)
        report(f"{name}, envs", [ENV_STEPS * options.num_envs / value for value in seconds], "steps/s")
    collision = Collision()
    seconds = time_calls(lambda: collision.simulate(np.random.default_rng(0), 10, 50_000), options.repeats)
    report("collision, generated", [500_000 / value for value in seconds], "timesteps/s")
    shares = reading_share(20 * options.repeats)
    print(f"text, reading a batch: {statistics.median(shares):.2f}% of a step (median)")


if __name__ == "__main__":
    main()
