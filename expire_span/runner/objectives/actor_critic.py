"""Actor-critic: collect a rollout of one block, then learn from it through the whole block (section A.2.2).

    delta_t = r_t + discount V_{t+1} - V_t              within the episode
    A_t     = sum_k (discount gae_lambda)^k delta_{t+k}        generalized advantage estimation (GAE)
    ratio   = pi(a_t) / pi_old(a_t)
    loss    = -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + value_coef (V_t - R_t)^2 / 2 - entropy_coef H,  R = A + V_old

With one epoch and no dropout the ratio is 1, and this is plain actor-critic (A2C); with more epochs it is PPO.
An episode that is truncated by its time limit is treated like one that terminates (our choice).
The model's outputs are the action logits and, last, the value. Memories of earlier episodes are out of reach.
"""

import math
from collections import Counter
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.base import Envs, RLTask

from ...output_heads import at_least_float32
from ...transformer import State
from ..build import autocast
from ..logging.answer_metrics import AccuracyByDistance
from ..logging.metrics import MetricAverager, Metrics, RunningMeans
from ..logging.performance import StepTimer

Rollout = dict[str, Tensor]  # (B, T) each; observation (B, T, vocab_size); next_value (B,)


class ActorCritic:
    """Environments to act in, and the rollout that is being learned from.

    Raises ValueError where evaluation would never end, where one update would use a rollout more than once, or where
    learning would not see what acting saw.
    """

    def __init__(
        self, task: RLTask, config: DictConfig, device: torch.device, averager: MetricAverager, timer: StepTimer
    ):
        if config.eval.max_blocks is None:
            raise ValueError("eval.max_blocks must be a number, since environments never end; got null")
        if config.train.grad_accumulation > 1 and config.actor_critic.update_epochs > 1:
            raise ValueError(
                f"train.grad_accumulation={config.train.grad_accumulation} does not go together with "
                f"actor_critic.update_epochs={config.actor_critic.update_epochs}; use a larger train.batch_size instead"
            )
        if config.model.get("random_drop"):
            raise ValueError(
                "memory.random_drop=true hides from learning what acting has seen; it is for tasks that predict: use "
                "memory.random_drop=false"
            )
        self.task, self.config, self.device, self.averager, self.timer = task, config, device, averager, timer
        self.envs = task.make_envs(config.train.batch_size, device, split="train")
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.rollout: Rollout = {}
        self.epoch = 0  # how often the rollout has been learned from
        self.blocks = 0  # rollouts collected
        self.progress = MetricAverager()  # of the episodes that ended since the curriculum's last decision

    def loss(self, model: Any, state: State, span_loss_scale: float, progress: float) -> tuple[Tensor, State]:
        """The loss on the current rollout, after collecting it if need be; the state advances after its last epoch."""
        settings = self.config.actor_critic
        if not self.rollout:
            start = self.timer.now()
            with autocast(self.config, self.device):
                num_steps = self.config.train.block_size
                self.rollout, _, episodes = collect_rollout(model, state, self.envs, self.generator, num_steps)
            self.timer.add("rollout", start)
            self.blocks += 1
            episodes = {name: value for name, value in episodes.items() if name.startswith("rl/")}
            self.averager.add(episodes)
            self.progress.add(episodes)
        rollout = self.rollout
        model.train()
        with autocast(self.config, self.device):
            outputs, next_state, metrics = model(rollout["observation"], state, rollout["reach"])
        log_probs, values = policy_and_value(outputs)  # (B, T, actions), (B, T)

        advantages = compute_gae(rollout, settings.discount, settings.gae_lambda)  # (B, T)
        returns = advantages + rollout["value"]
        if settings.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        log_ratio = log_probs.gather(-1, rollout["action"][..., None])[..., 0] - rollout["log_prob"]  # (B, T)
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)
        policy_loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages).mean()
        value_loss = (values - returns).square().mean() / 2
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        entropy_coef = settings.entropy_coef + (settings.final_entropy_coef - settings.entropy_coef) * progress
        loss = policy_loss + settings.value_coef * value_loss - entropy_coef * entropy
        span_loss = span_loss_scale * metrics.pop("span_loss")

        self.epoch += 1
        if self.epoch == settings.update_epochs:
            self.rollout, self.epoch, state = {}, 0, next_state
        with torch.no_grad():
            self.averager.add(metrics)
            self.averager.add({
                "train/loss": loss.detach(),
                "train/policy_loss": policy_loss.detach(),
                "train/value_loss": value_loss.detach(),
                "train/entropy": entropy.detach(),
                "train/span_loss": span_loss.detach(),
                "train/approx_kl": (ratio - 1 - log_ratio).mean(),
                "train/clip_fraction": ((ratio - 1).abs() > settings.clip_coef).float().mean(),
            })  # fmt: skip
        return loss + span_loss, state

    def summarize(self, means: Metrics) -> Metrics:
        """The means of a logging interval, per finished episode."""
        metrics = per_episode(means)
        if self.task.curriculum_stage is not None:
            metrics["train/curriculum_stage"] = self.task.curriculum_stage
        return metrics

    def advance_curriculum(self) -> None:
        """Tell the task the mean of its `progress_metric` over the episodes that ended since the last call."""
        metrics = per_episode(self.progress.pop_means())
        self.task.update_curriculum(metrics.get(f"rl/{self.task.progress_metric}", math.nan))

    def time_metrics(self, counts: Counter[str], milliseconds: Counter[str]) -> Metrics:
        """The time of a block of experience: of its rollout, and of that together with all epochs of learning from it.

        Nothing if there was no rollout: these updates learned from an older one.
        """
        train, rollouts = self.config.train, counts["rollout"]
        if not rollouts:
            return {}
        rollout = milliseconds["rollout"] / rollouts
        learning = (milliseconds["update"] - milliseconds["rollout"]) / (counts["update"] * train.grad_accumulation)
        total = rollout + self.config.actor_critic.update_epochs * learning
        return {
            "perf/ms_per_batch": total,
            "perf/ms_per_rollout": rollout,
            "perf/tokens_per_second": 1000 * train.batch_size * train.block_size / total,
        }

    @staticmethod
    @torch.no_grad()
    def evaluate(model: Any, task: RLTask, split: str, config: DictConfig, device: torch.device) -> Metrics:
        """Metrics split/... over all episodes that begin within `eval.max_blocks` blocks, in environments of the split.

        Each of these episodes is played to its end: otherwise short ones, which are the failed or the easy ones, would
        be over-represented. Where the task knows how far back an episode's answer lies, success is also given by that.
        """
        envs = task.make_envs(config.eval.batch_size, device, split=split)
        generator = torch.Generator(device).manual_seed(config.seed)
        state, averager = model.initial_state(config.eval.batch_size), RunningMeans()
        by_distance = AccuracyByDistance(device, model.max_reach(config.eval.span_cap))
        block_size = config.eval.block_size
        steps_left = config.eval.max_blocks * block_size  # in which counted episodes may begin
        while steps_left > 0 or (envs.steps > -steps_left).any():
            with autocast(config, device):
                _, state, means = collect_rollout(
                    model, state, envs, generator, block_size, steps_left, by_distance, config.eval.span_cap
                )
            del means["span_loss"]
            averager.add(means)
            steps_left -= block_size
        metrics = per_episode(averager.means())
        metrics |= by_distance.beyond_reach()
        metrics |= {f"rl/success_{name}": value for name, value in by_distance.accuracies().items()}
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "envs": self.envs.state_dict(),
            "generator": self.generator.get_state(),
            "rollout": self.rollout,
            "epoch": self.epoch,
            "blocks": self.blocks,
            "progress": self.progress.values(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.envs.load_state_dict(state["envs"])
        self.generator.set_state(state["generator"].cpu())
        self.rollout = {name: tensor.to(self.device) for name, tensor in state["rollout"].items()}
        self.epoch, self.blocks = state["epoch"], state["blocks"]
        self.progress.load_values(state["progress"])


@torch.no_grad()
def collect_rollout(
    model: Any,
    state: State,
    envs: Envs,
    generator: torch.Generator,
    num_steps: int,
    max_start_step: float = math.inf,
    by_distance: AccuracyByDistance | None = None,
    span_cap: int | None = None,
) -> tuple[Rollout, State, Metrics]:
    """Act for num_steps timesteps, sampling from the policy one timestep at a time.

    Args:
        max_start_step: Count only episodes that begin fewer than this many timesteps from now.
        by_distance: receives the success of each counted episode, where the task knows a distance.
        span_cap: timesteps; spans longer than this are shortened to it.

    Returns:
        the rollout, the state after it, and the metrics of memory and episodes (see `per_episode`).
    """
    steps, averager = [], MetricAverager()
    model.eval()
    for step in range(num_steps):
        observation, reach = envs.observe(), envs.steps  # (B, vocab_size), (B,)
        outputs, state, metrics = model(observation[:, None], state, reach[:, None], span_cap)
        log_probs, value = policy_and_value(outputs[:, 0])  # (B, actions), (B,)
        action = torch.multinomial(log_probs.exp(), 1, generator=generator)  # (B, 1)
        reward, done = envs.step(action[:, 0])  # (B,), (B,)
        steps.append({
            "observation": observation,
            "reach": reach,
            "action": action[:, 0],
            "log_prob": log_probs.gather(1, action)[:, 0],
            "value": value,
            "reward": reward,
            "done": done,
        })  # fmt: skip
        counted = done & (step + 1 - envs.episode_info["episode_length"] < max_start_step)  # (B,)
        sums = {f"rl/{name}": (value.float() * counted).sum() for name, value in envs.episode_info.items()}
        averager.add({**sums, "rl/episodes": counted.float().sum(), **metrics})
        if by_distance and "distance" in envs.episode_info:
            by_distance.add(envs.episode_info["success"], counted, envs.episode_info["distance"])
    rollout = {name: torch.stack([step[name] for step in steps], 1) for name in steps[0]}  # (B, T, ...)
    outputs, _, _ = model(envs.observe()[:, None], state, envs.steps[:, None], span_cap)
    rollout["next_value"] = policy_and_value(outputs[:, 0])[1]  # (B,)
    return rollout, state, averager.pop_means()


def policy_and_value(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Split model outputs (..., actions + 1) into log-probabilities (..., actions) and value (...)."""
    outputs = at_least_float32(outputs)
    return outputs[..., :-1].log_softmax(-1), outputs[..., -1]


def compute_gae(rollout: Rollout, discount: float, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates (B, T); nothing is propagated across the end of an episode."""
    advantages, next_value = torch.zeros_like(rollout["value"]), rollout["next_value"]
    next_advantage = torch.zeros_like(next_value)  # (B,)
    for t in reversed(range(advantages.shape[1])):
        nonterminal = (~rollout["done"][:, t]).to(next_value.dtype)  # (B,)
        td_error = rollout["reward"][:, t] + discount * next_value * nonterminal - rollout["value"][:, t]
        next_advantage = td_error + discount * gae_lambda * nonterminal * next_advantage
        advantages[:, t], next_value = next_advantage, rollout["value"][:, t]
    return advantages


def per_episode(means: Metrics) -> Metrics:
    """Turn means over timesteps of sums over finished episodes (rl/NAME) into means per episode.

    Without a finished episode (rl/episodes is 0) the rl/... metrics are left out.
    """
    episodes = means.pop("rl/episodes", 0.0)
    metrics = {}
    for name, value in means.items():
        if not name.startswith("rl/"):
            metrics[name] = value
        elif episodes:
            metrics[name] = value / episodes
    return metrics
