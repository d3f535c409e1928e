"""The kind of task that answers back: act for a block, then learn from it, through the block's whole length.

    advantage A_t = sum over k of (discount trace)^k (r + discount V - V)_{t+k}, within the episode
    loss = - min(ratio A, clamp(ratio, 1 - c, 1 + c) A) + value (V - (A + V_then))^2 / 2 - entropy H

With one epoch, and nothing dropped, the ratio is 1, and this is plain actor-critic; with more, each block is learned
from again (PPO). An episode's end by the time limit is an end like any other (c).
A model's outputs are the moves' scores, then the value; memories of earlier episodes are out of reach.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..heads import at_least_float32
from ..transformer import State
from .build import precision
from .measures import ByDistance, Figures, Meter

if TYPE_CHECKING:
    from .training import Training


class Acting:
    """Worlds to act in, and the block last acted."""

    def __init__(self, worlds: Any, generator: torch.Generator):
        self.worlds, self.generator = worlds, generator
        self.block: dict[str, Tensor] = {}  # (B, T) each, observations (B, T, vocabulary), the next one's value (B,)
        self.uses = 0  # how often it has been learned from

    def state_dict(self) -> dict[str, Any]:
        worlds, generator = self.worlds.state_dict(), self.generator.get_state()
        return {"worlds": worlds, "generator": generator, "block": self.block, "uses": self.uses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.worlds.load_state_dict(state["worlds"])
        self.generator.set_state(state["generator"].cpu())
        self.block = {name: part.to(self.worlds.device) for name, part in state["block"].items()}
        self.uses = state["uses"]


def source(task: Any, config: DictConfig, device: torch.device, part: str = "train") -> Acting:
    """Raises ValueError where evaluation would have no end, or an update would learn from a block more than once."""
    if config.evaluation.blocks is None:
        raise ValueError("evaluation.blocks must be a number, since worlds have no end; got null")
    if config.train.accumulate > 1 and config.actor_critic.epochs > 1:
        raise ValueError("train.accumulate must be 1 where actor_critic.epochs is more: use a larger train.batch")
    worlds = task.worlds(config.train.batch if part == "train" else config.evaluation.batch, device, split=part)
    return Acting(worlds, torch.Generator(device).manual_seed(config.seed))


def split(scores: Tensor) -> tuple[Tensor, Tensor]:
    """A model's outputs (..., actions + 1) as the moves' log p (..., actions) and the value (...)."""
    scores = at_least_float32(scores)
    return scores[..., :-1].log_softmax(-1), scores[..., -1]


@torch.no_grad()
def act(
    model: Any,
    state: State,
    acting: Acting,
    timesteps: int,
    until: float = math.inf,
    by_distance: ByDistance | None = None,
) -> tuple[dict[str, Tensor], State, Figures]:
    """Acts one timestep at a time. Returns the block, the memories after it, and figures, see `per_episode`.

    Episodes count when they end, but those that began `until` timesteps after this call or later.
    """
    worlds, rows, sums = acting.worlds, [], Meter()
    model.eval()
    for timestep in range(timesteps):
        seen = {"observation": worlds.observe(), "reach": worlds.steps}
        scores, state, about_memory = model(seen["observation"][:, None], state, seen["reach"][:, None])
        moves, value = split(scores[:, 0])  # (B, actions), (B,)
        action = torch.multinomial(moves.exp(), 1, generator=acting.generator)  # (B, 1)
        reward, done = worlds.step(action[:, 0])
        chosen = {"action": action[:, 0], "log_p": moves.gather(1, action)[:, 0], "value": value}
        rows.append({**seen, **chosen, "reward": reward, "done": done})
        counted = done & (timestep + 1 - worlds.ended["length"] < until)
        sums.add({f"rl/{name}": (figure.float() * counted).sum() for name, figure in worlds.ended.items()})
        sums.add({"rl/episodes": counted.float().sum(), **about_memory})
        if by_distance and "distance" in worlds.ended:
            by_distance.add(worlds.ended["success"], counted, worlds.ended["distance"])
    block = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}  # (B, T, ...)
    scores, _, _ = model(worlds.observe()[:, None], state, worlds.steps[:, None])
    block["next_value"] = split(scores[:, 0])[1]  # (B,)
    return block, state, sums.means()


def advantages(block: dict[str, Tensor], discount: float, trace: float) -> Tensor:
    """(B, T): what each action gave beyond what was expected, discounted; nothing counts across an episode's end."""
    result, value = torch.zeros_like(block["value"]), block["next_value"]
    following = torch.zeros_like(value)  # (B,)
    for t in reversed(range(result.shape[1])):
        goes_on = (~block["done"][:, t]).to(value.dtype)  # (B,)
        surprise = block["reward"][:, t] + discount * value * goes_on - block["value"][:, t]
        following = surprise + discount * trace * goes_on * following
        result[:, t], value = following, block["value"][:, t]
    return result


def step(training: "Training", alpha: float) -> tuple[Tensor, dict[str, Any]]:
    """The loss of the present block, after acting it if it is new, and its figures."""
    acting, settings = training.source, training.config.actor_critic
    figures: dict[str, Any] = {}
    if not acting.block:
        with precision(training.config, training.device):
            acting.block, _, sums = act(training.forward, training.state, acting, training.config.train.block)
        training.blocks += 1
        figures = {name: figure for name, figure in sums.items() if name.startswith("rl/")}
    block = acting.block
    training.model.train()
    with precision(training.config, training.device):
        scores, state, about_memory = training.forward(block["observation"], training.state, block["reach"])
    moves, value = split(scores)  # (B, T, actions), (B, T)

    gain = advantages(block, settings.discount, settings.trace)  # (B, T)
    goal = gain + block["value"]
    if settings.normalise:
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    ratio = (moves.gather(-1, block["action"][..., None])[..., 0] - block["log_p"]).exp()  # (B, T)
    near = ratio.clamp(1 - settings.ratio_clip, 1 + settings.ratio_clip)  # (B, T)
    policy_loss = -torch.minimum(ratio * gain, near * gain).mean()
    value_loss = (value - goal).square().mean() / 2
    entropy = -(moves.exp() * moves).sum(-1).mean()
    share = training.update / training.config.train.updates
    entropy_weight = settings.entropy + (settings.final_entropy - settings.entropy) * share
    loss = policy_loss + settings.value * value_loss - entropy_weight * entropy

    acting.uses += 1
    if acting.uses == settings.epochs:
        acting.block, acting.uses, training.state = {}, 0, state
    span_loss = about_memory.pop("span_loss")
    figures |= {"train/loss": loss.detach(), "train/entropy": entropy.detach(), **about_memory}
    return loss + alpha * span_loss, figures


def interval(training: "Training", means: Figures) -> Figures:
    """Means over the episodes that ended since the last reading; the task hears how well they went."""
    figures = per_episode(means)
    figures["train/stage"] = training.task.stage
    training.task.feedback(figures.get(f"rl/{training.task.progress}", float("nan")))
    return figures


def per_episode(means: Figures) -> Figures:
    """rl/... are sums over the episodes that ended, and rl/episodes their number; without any they say nothing."""
    episodes = means.pop("rl/episodes", 0.0)
    sums = {name for name in means if name.startswith("rl/")}
    return {name: means[name] / (episodes if name in sums else 1) for name in means if episodes or name not in sums}


@torch.no_grad()
def evaluate(model: Any, task: Any, part: str, config: DictConfig, device: torch.device) -> Figures:
    """Acts as in training, in worlds of the split's own: the episodes that begin in `evaluation.blocks` blocks count.

    All of them are acted to their ends, else the short ones, which are the failed ones or the easy ones, would count
    more. Where the worlds know how far back it lies what an episode asks for, success is told by that, too.
    """
    acting, state, meter = source(task, config, device, part), model.initial_state(config.evaluation.batch), Meter()
    by_distance, block = ByDistance(device), config.evaluation.block
    left = config.evaluation.blocks * block  # timesteps in which episodes may begin that count
    while left > 0 or (acting.worlds.steps > -left).any():
        with precision(config, device):
            _, state, sums = act(model, state, acting, block, left, by_distance)
        del sums["span_loss"]
        meter.add(sums)
        left -= block
    figures = per_episode(meter.means())
    figures |= {f"rl/success_{name}": share for name, share in by_distance.shares().items()}
    return {f"{part}/{name}": figure for name, figure in figures.items()}
