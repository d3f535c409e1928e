"""An agent of a gridworld, timestep by timestep: where it is, what it does, and what each layer still remembers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from expire_span.tasks.gridworld import landmark_in_view

from ...analysis import memory_contents
from ...decoding import Decoder
from ...output_heads import at_least_float32
from ..load_run import LoadedRun

ACTIONS = {"^": "up", ">": "right", "v": "down", "<": "left"}  # actions 0 to 3


class Frame(NamedTuple):
    """One timestep. Rows of the current episode have one character, or number, for each timestep until now."""

    map: list[str]  # rows of the legend's letters, with the agent as @
    caption: str  # of the map
    observed: str  # the landmark in view at each timestep; "." if there was none
    actions: str  # ACTIONS
    memories: list[list[float]]  # of each layer, the soft mask m of each timestep: 1 held in full, 0 forgotten
    decision: str  # what the agent does now, how likely that was, and the return it expects
    ending: str | None  # how the episode ended with this action (None: it goes on)


@torch.no_grad()
def play(run: LoadedRun, num_steps: int, seed: int, width: int = 100) -> Iterator[Frame]:
    """Play one environment of the test split, whose map is at most `width` columns wide.

    Actions are sampled from the policy, as in training.
    """
    envs = run.task.make_envs(1, run.device, seed=seed, split="test")
    generator = torch.Generator(run.device).manual_seed(seed)
    decoder = Decoder(run.model.eval(), run.model.initial_state(1))
    observed = actions = ""
    for _ in range(num_steps):
        observation, reach = envs.observe(), envs.steps
        outputs = at_least_float32(decoder(observation, reach)[0])  # (num_classes,)
        log_probs, value = outputs[:-1].log_softmax(-1), outputs[-1]  # (actions,), ()
        action = torch.multinomial(log_probs.exp(), 1, generator=generator)  # (1,)
        arrow = list(ACTIONS)[int(action)]
        observed, actions = observed + landmark_in_view(run.task, observation[0]), actions + arrow
        state = decoder.state()
        episode_start = int(state["step"]) - 1 - int(reach)
        memories = []
        for times, m in memory_contents(run.model, state):
            row = [0.0] * len(observed)
            for timestep, mask in zip((times - episode_start).tolist(), m.tolist(), strict=True):
                row[max(0, timestep)] = mask
            memories.append(row)
        *rows, caption = envs.render(width=width).splitlines()
        probability = log_probs[action].exp().item()
        decision = f"goes {ACTIONS[arrow]}, with probability {probability:.0%}; expects a return of {value:.2f}"
        done, ending = envs.step(action)[1], None
        if done:
            ending = ", ".join(f"{name} {float(value):.4g}" for name, value in envs.episode_info.items())
        yield Frame(rows, caption, observed, actions, memories, decision, ending)
        if done:
            observed = actions = ""
