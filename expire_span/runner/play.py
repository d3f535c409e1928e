"""Watch a trained agent, with what it still remembers: `expire-span-play RUN`."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from expire_span.tasks.gridworld import noticed

from ..analysis import remembered
from .actor_critic import split
from .main import end
from .saved import Saved, open_run, saved_config
from .settings import checked

MOVES = {"^": "up", ">": "right", "v": "down", "<": "left"}  # actions 0 to 3
SHADES = "·░▒▓█"  # m = 0, forgotten, to m = 1


@torch.no_grad()
def frames(run: Saved, steps: int, seed: int, width: int = 100) -> Iterator[str]:
    """One world of the test split, timestep by timestep, the policy sampled as in training; at most `width` wide."""
    worlds = run.task.worlds(1, run.device, seed=seed, split="test")
    chance = torch.Generator(run.device).manual_seed(seed)
    state = run.model.initial_state(1)
    saw = moved = ""
    for _ in range(steps):
        observation, reach = worlds.observe(), worlds.steps
        scores, state, _ = run.model(observation[:, None], state, reach[:, None])
        moves, value = split(scores[0, 0])  # (actions,), ()
        action = torch.multinomial(moves.exp(), 1, generator=chance)  # (1,)
        move = list(MOVES)[int(action)]
        saw, moved = saw + noticed(run.task, observation[0]), moved + move
        began = int(state["now"]) - 1 - int(reach)
        rows = {"seen": saw, "moves": moved}
        for number, (times, m) in enumerate(remembered(run.model, state)):
            strip = [SHADES[0]] * len(saw)
            shades = (m * (len(SHADES) - 1)).ceil().long()
            for moment, shade in zip((times - began).tolist(), shades.tolist(), strict=True):
                strip[max(0, moment)] = SHADES[shade]
            rows[f"layer {number}"] = "".join(strip)
        shown = [f"{name:9}{strip[-(width - 9) :]}" for name, strip in rows.items()]
        says = f"goes {MOVES[move]}, {moves[action].exp().item():.0%} sure; expects a return of {value:.2f}"
        yield "\n".join([worlds.frame(width=width), *shown, says])
        if worlds.step(action)[1]:
            saw = moved = ""
            yield "over: " + ", ".join(f"{name} {float(figure):.4g}" for name, figure in worlds.ended.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="expire-span-play",
        description="Watch the agent of a run in corridor or portal, and what it still remembers.",
        epilog="seen and moves go through the present episode, one sign a timestep: r, b an object, R, B a door. Below "
        "them stands what each layer still has of it: █ in full, ▓▒░ fading, · forgotten.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--steps", type=int, default=100, help="timesteps to watch (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="another world, and other chances")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between timesteps")
    options = parser.parse_args()
    try:
        if options.steps < 1 or options.pause < 0 or options.seed < 0:
            raise ValueError("--steps must be at least 1, --pause and --seed must not be negative")
        run = open_run(options.run, checked(saved_config(options.run)))
        if not hasattr(run.task, "worlds"):
            raise ValueError(f"{options.run} is of a task without worlds; expire-span-play shows corridor and portal")
        for frame in frames(run, options.steps, options.seed):
            print(f"{frame}\n", flush=True)
            time.sleep(options.pause)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        end(error)
