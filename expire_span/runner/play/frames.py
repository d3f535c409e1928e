"""An agent in an environment, timestep by timestep: where it is, what it does, and what each layer still remembers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from expire_span.tasks.base import RLTask

from ...analysis import memory_contents
from ...decoding import Decoder
from ..load_run import LoadedRun
from ..objectives.actor_critic import ActionSampler, policy_and_value


class Frame(NamedTuple):
    """One timestep. Rows of the current episode have one character, or number, for each timestep until now."""

    text: list[str]  # lines of a map; none if there is an image alone, or no picture at all
    image: np.ndarray | None  # (rows, columns, 3) uint8
    caption: str  # of the map or the image
    observed: str  # what the agent observed, as its task abbreviates it; "." for nothing, and "" if it does not
    actions: str
    memories: list[list[float]]  # of each layer, the soft mask m of each timestep: 1 held in full, 0 forgotten
    decision: str  # what the agent does now, how likely that was, and the return it expects
    ending: str | None  # how the episode ended with this action (None: it goes on)


@torch.no_grad()
def play(run: LoadedRun, num_steps: int, seed: int, width: int = 100, with_image: bool = False) -> Iterator[Frame]:
    """Play one environment of the test split, whose map is at most `width` columns wide.

    Actions are sampled from the policy, as in training.
    """
    task = run.task
    assert isinstance(task, RLTask)
    envs = task.make_env_to_watch(run.device, seed, with_image)
    sampler = ActionSampler(
        torch.Generator(run.device).manual_seed(seed), slice(0, 1), 1, distribution=task.action_distribution
    )
    decoder = Decoder(run.model.eval(), run.model.initial_state(1))
    observed = actions = ""
    for _ in range(num_steps):
        observation, reach = envs.observe(), envs.steps
        policy, value = policy_and_value(decoder(observation, reach), sampler.distribution)  # value: (1,)
        action = policy.sample(sampler)  # (1,) or (1, k)
        view, (symbol, decision) = task.view(envs, width), task.describe_action(action)
        observed, actions = observed + view.observed, actions + symbol
        if not action.is_floating_point():
            decision += f", with probability {policy.log_prob(action).exp().item():.0%}"
        decision += f"; expects a return of {value.item():.2f}"
        memories = episode_memories(run, decoder.state(), int(reach))
        done, ending = envs.step(action)[1], None
        if done:
            ending = ", ".join(f"{name} {float(value):.4g}" for name, value in envs.episode_info.items())
        yield Frame(view.text, view.image, view.caption, observed, actions, memories, decision, ending)
        if done:
            observed = actions = ""
        if envs.resetting.any():
            envs.step(action)  # which is ignored: a new episode begins


def episode_memories(run: LoadedRun, state: dict[str, Any], timestep: int) -> list[list[float]]:
    """Of each layer, the soft mask m of each timestep of the episode, up to the present one."""
    episode_start = int(state["step"]) - 1 - timestep
    memories = []
    for times, m in memory_contents(run.model, state):
        row = [0.0] * (timestep + 1)
        for time, mask in zip((times - episode_start).tolist(), m.tolist(), strict=True):
            row[max(0, time)] = mask
        memories.append(row)
    return memories
