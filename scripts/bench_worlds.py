"""Environment steps a second of the gridworlds alone, random actions, observations included."""

import argparse
import statistics
import time

import torch

from expire_span.tasks.corridor import Corridor
from expire_span.tasks.gridworld import Gridworld
from expire_span.tasks.portal import Portal


def steps_per_second(task: Gridworld, environments: int, device: str, steps: int, repeats: int) -> list[float]:
    """One figure a repeat; a first repeat, which warms up, is left out."""
    worlds = task.worlds(environments, device)
    actions = torch.randint(task.actions, (steps, environments), device=device)
    figures = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for action in actions:
            worlds.step(action)
            worlds.observe()
        if worlds.device.type == "cuda":
            torch.cuda.synchronize()
        figures.append(steps * environments / (time.perf_counter() - start))
    return figures[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU; at 1024 environments more only wait for each other"
    )
    parser.add_argument("--steps", type=int, default=500, help="of every environment, in a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.environments} environments, {arguments.device}, {torch.get_num_threads()} threads")
    for task in (Corridor(), Portal()):
        figures = steps_per_second(task, arguments.environments, arguments.device, arguments.steps, arguments.repeats)
        middle, least, most = statistics.median(figures), min(figures), max(figures)
        name = type(task).__name__.lower()
        print(f"{name:9} {middle / 1e6:5.1f} million steps a second (median; {least / 1e6:.1f} to {most / 1e6:.1f})")


if __name__ == "__main__":
    main()
