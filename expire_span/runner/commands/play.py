"""Watch a trained agent, and what it still remembers: `expire-span-play RUN`."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from expire_span.tasks.gridworld import Gridworld, landmark_in_view

from ...analysis import memory_contents
from ...output_heads import at_least_float32
from ..config.schema import validate
from ..errors import exit_with_message
from ..load_run import LoadedRun, load_run
from ..run_folder.config_files import load_config

ACTIONS = {"^": "up", ">": "right", "v": "down", "<": "left"}  # actions 0 to 3
SHADES = "·░▒▓█"  # from m = 0, forgotten, to m = 1


@torch.no_grad()
def frames(run: LoadedRun, num_steps: int, seed: int, width: int = 100) -> Iterator[str]:
    """Play one environment of the test split and yield one text frame a timestep, at most `width` columns wide.

    Actions are sampled from the policy, as in training.
    """
    envs = run.task.make_envs(1, run.device, seed=seed, split="test")
    generator = torch.Generator(run.device).manual_seed(seed)
    state = run.model.initial_state(1)
    observations = actions = ""  # of the current episode, one character a timestep
    for _ in range(num_steps):
        observation, reach = envs.observe(), envs.steps
        outputs, state, _ = run.model(observation[:, None], state, reach[:, None])
        outputs = at_least_float32(outputs[0, 0])  # (num_classes,)
        log_probs, value = outputs[:-1].log_softmax(-1), outputs[-1]  # (actions,), ()
        action = torch.multinomial(log_probs.exp(), 1, generator=generator)  # (1,)
        arrow = list(ACTIONS)[int(action)]
        observations, actions = observations + landmark_in_view(run.task, observation[0]), actions + arrow
        episode_start = int(state["step"]) - 1 - int(reach)
        rows = {"observed": observations, "actions": actions}
        for layer, (times, m) in enumerate(memory_contents(run.model, state)):
            row = [SHADES[0]] * len(observations)
            shades = (m * (len(SHADES) - 1)).ceil().long()
            for timestep, shade in zip((times - episode_start).tolist(), shades.tolist(), strict=True):
                row[max(0, timestep)] = SHADES[shade]
            rows[f"layer {layer}"] = "".join(row)
        lines = [f"{name:9}{row[-(width - 9) :]}" for name, row in rows.items()]
        probability = log_probs[action].exp().item()
        caption = f"goes {ACTIONS[arrow]}, with probability {probability:.0%}; expects a return of {value:.2f}"
        yield "\n".join([envs.render(width=width), *lines, caption])
        if envs.step(action)[1]:
            observations = actions = ""
            episode = ", ".join(f"{name} {float(value):.4g}" for name, value in envs.episode_info.items())
            yield f"episode over: {episode}"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="expire-span-play",
        description="Watch the agent of a run in corridor or portal, and what it still remembers.",
        epilog="The rows below the map go through the current episode, one character a timestep. seen: r, b an object, "
        "R, B a door. layer N: what the layer still holds: █ in full, ▓▒░ fading, · forgotten.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--steps", type=int, default=100, help="timesteps to watch (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the environment and of the sampled actions (default 0)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between timesteps (default 0)")
    options = parser.parse_args()
    try:
        if options.steps < 1 or options.pause < 0 or options.seed < 0:
            raise ValueError("--steps must be at least 1, --pause and --seed must not be negative")
        run = load_run(options.run, validate(load_config(options.run)))
        if not isinstance(run.task, Gridworld):
            raise ValueError(f"the task of {options.run} has no environments; play shows corridor and portal")
        for frame in frames(run, options.steps, options.seed):
            print(f"{frame}\n", flush=True)
            time.sleep(options.pause)
    except KeyboardInterrupt:
        pass
    except Exception as error:
        exit_with_message(error)


if __name__ == "__main__":
    main()
