"""How fast the tasks are by themselves, in one run: worlds, acting in them, collisions, and the text pipeline.

    worlds      environment steps a second, random actions, observations included
    acting      the same with a model of two layers (d 64) that decides, and the share of that time which is the model's
    collision   timesteps generated a second
    text        the share of a training step (mini) that reading its batch takes
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
from expire_span.runner.actor_critic import Acting, act
from expire_span.tasks.collision import Collision
from expire_span.tasks.corridor import Corridor
from expire_span.tasks.gridworld import Gridworld
from expire_span.tasks.portal import Portal
from expire_span.tasks.text import Text


def laps(call: Callable[[], object], repeats: int, device: str = "cpu") -> list[float]:
    """Seconds of each call; a first one, which warms up, is left out."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def told(what: str, figures: list[float], unit: str) -> None:
    middle, least, most = statistics.median(figures), min(figures), max(figures)
    print(f"{what:34} {middle:10,.0f} {unit} (median; {least:,.0f} to {most:,.0f})", flush=True)


def alone(task: Gridworld, environments: int, steps: int, device: str) -> Callable[[], object]:
    worlds = task.worlds(environments, device)
    actions = torch.randint(task.actions, (steps, environments), device=device)

    def run() -> None:
        for action in actions:
            worlds.step(action)
            worlds.observe()

    return run


def acting(task: Gridworld, environments: int, steps: int, device: str) -> Callable[[], object]:
    """Two layers of Expire-Span whose memories live for a few timesteps, as after training."""
    config = TransformerConfig(task.vocabulary, 64, 2, 256, classes=task.classes, pre_norm=True)
    model = Transformer(config, [ExpireSpan(64, 40, 8, 1e-5, positions=25, init=0.1) for _ in range(2)]).to(device)
    source = Acting(task.worlds(environments, device), torch.Generator(device).manual_seed(0))
    state = model.initial_state(environments)

    def run() -> None:
        nonlocal state
        _, state, _ = act(model, state, source, steps)

    return run


def text_share(repeats: int) -> list[float]:
    """Percent of the time of a step of `task=text size=mini` that its batch takes to read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(np.random.default_rng(0).integers(256, size=4_000_000, dtype=np.uint8).tobytes())
        stream = Text(path).stream("train", 16, 64)
        model = Transformer(
            TransformerConfig(256, 96, 2, 384, pre_norm=True),
            [ExpireSpan(96, 512, 32, 1e-6, positions=64) for _ in range(2)],
        )
        state = model.initial_state(16)

        def step() -> None:
            nonlocal state
            scores, state, figures = model(batch.tokens, state)
            losses = model.output.losses(scores.flatten(0, 1), batch.targets.flatten())
            (losses.mean() + figures["span_loss"]).backward()

        shares = []
        for _ in range(repeats):
            start = time.perf_counter()
            batch = next(stream)
            read = time.perf_counter() - start
            step()
            shares.append(100 * read / (time.perf_counter() - start))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small worlds only wait for each other")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.environments} environments, {options.device}, {options.threads} thread")
    for task in (Corridor(), Portal()):
        name = type(task).__name__.lower()
        seconds = laps(alone(task, options.environments, 500, options.device), options.repeats, options.device)
        told(f"{name}, worlds", [500 * options.environments / each for each in seconds], "steps/s")
        of_worlds = statistics.median(seconds) / 500  # a step
        for environments in (64, options.environments):
            taken = laps(acting(task, environments, 25, options.device), options.repeats, options.device)
            told(f"{name}, acting in {environments}", [25 * environments / each for each in taken], "steps/s")
        share = 1 - of_worlds / (statistics.median(taken) / 25)
        print(f"{name}, acting in {options.environments}: {100 * share:.0f} % of the time is the model's")
    collision = Collision()
    seconds = laps(lambda: collision.simulate(np.random.default_rng(0), 10, 50_000), options.repeats)
    told("collision, generated", [500_000 / each for each in seconds], "timesteps/s")
    shares = text_share(20 * options.repeats)
    print(f"text, reading a batch: {statistics.median(shares):.2f} % of a step (median)")


if __name__ == "__main__":
    main()
