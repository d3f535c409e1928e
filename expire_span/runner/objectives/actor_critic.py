"""Actor-critic: collect a rollout of one block, then learn from it through the whole block (section A.2.2).

    delta_t = r_t + discount V_{t+1} - V_t              within the episode; at its end V_{t+1} is 0
    A_t     = sum_k (discount gae_lambda)^k delta_{t+k}        generalized advantage estimation (GAE)
    ratio   = pi(a_t) / pi_old(a_t)
    loss    = -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + value_coef (V_t - R_t)^2 / 2 - entropy_coef H,  R = A + V_old

With one epoch and no dropout the ratio is 1, and this is plain actor-critic (A2C); with more epochs it is PPO.
An episode that is truncated by its time limit is treated like one that terminates (our choice), or, with
`bootstrap_truncated`, V_{t+1} is the value of its last observation: the environments then show that for one more
timestep, in which no action is taken, and from which nothing is learned.
The model's outputs are those of the task's distribution of actions and, last, the value. Memories of earlier episodes
are out of reach.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from expire_span.tasks.actions import ActionDistribution, Categorical
from expire_span.tasks.base import Envs, RLTask

from ...decoding import Decoder
from ...output_heads import at_least_float32
from ..build import autocast
from ..logging.answer_metrics import AccuracyByDistance
from ..logging.metrics import MetricAverager, Metrics, RunningMeans, to_numbers
from ..logging.performance import StepTimer
from ..micro_batches import MicroBatches, evaluation_states
from ..ranks import max_numbers, own_streams, sum_tensor, world_size

Rollout = dict[str, Tensor]  # (B, T) each; observation (B, T, vocab_size); action (B, T) or (B, T, k); next_value (B,)
Distribution = Callable[[Tensor], ActionDistribution]


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
        self.streams = own_streams(config.train.batch_size, "train.batch_size")
        own_streams(config.eval.batch_size, "eval.batch_size")
        options = {"autoreset_mode": "next_step"} if config.actor_critic.bootstrap_truncated else {}
        self.envs = own_envs(task, config.train.batch_size, device, "train", **options)
        self.generator = torch.Generator(device).manual_seed(config.seed)  # of actions, the same on all ranks
        self.rollout: Rollout = {}
        self.epoch = 0  # how often the rollout has been learned from
        self.blocks = 0  # rollouts collected
        self.progress = MetricAverager()  # of the episodes that ended since the curriculum's last decision

    def next_block(self, model: Any, states: MicroBatches) -> Rollout:
        """The rollout to learn from; a new one once all epochs of the last one are done."""
        if not self.rollout:
            start = self.timer.now()
            num_envs, distribution = self.config.train.batch_size, self.task.action_distribution
            sampler = ActionSampler(self.generator, self.streams, num_envs, distribution)
            with autocast(self.config, self.device):
                actor = Actor(model, states)  # leaves the states as they are: learning goes through the block once more
                self.rollout, episodes = collect_rollout(actor, self.envs, sampler, self.config.train.block_size)
                self.rollout["next_value"] = actor(self.envs.observe(), self.envs.steps)[:, -1]  # (B,)
            add_advantages(self.rollout, self.config.actor_critic)
            self.timer.add("rollout", start)
            self.blocks += 1
            self.averager.add(episodes)
            self.progress.add(episodes)
        model.train()
        return self.rollout

    def loss(
        self, model: Any, rollout: Rollout, states: MicroBatches, index: int, span_loss_scale: float, progress: float
    ) -> Tensor:
        """One micro-batch's share of the loss on the rollout; its memories advance after the last epoch."""
        settings, is_last = self.config.actor_critic, index == len(states) - 1
        rows = states.rows[index]
        part = {name: values[rows] for name, values in rollout.items()}
        weight = part["weight"]  # (B, T)
        share = (rows.stop - rows.start) / self.config.train.batch_size
        with autocast(self.config, self.device):
            outputs, next_state, metrics = model(part["observation"], states[index], part["reach"])
        policy, values = policy_and_value(outputs, self.task.action_distribution)  # of (B, T) timesteps, (B, T)

        log_ratio = policy.log_prob(part["action"]) - part["log_prob"]  # (B, T)
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)
        surrogate = torch.minimum(ratio * part["advantage"], clipped_ratio * part["advantage"])  # (B, T)
        policy_loss = -(surrogate * weight).mean()
        value_loss = ((values - part["return"]).square() * weight).mean() / 2
        entropy = (policy.entropy() * weight).mean()
        entropy_coef = settings.entropy_coef + (settings.final_entropy_coef - settings.entropy_coef) * progress
        loss = policy_loss + settings.value_coef * value_loss - entropy_coef * entropy
        span_loss = span_loss_scale * metrics.pop("span_loss")

        if self.epoch + 1 == settings.update_epochs:
            states[index] = next_state
        if is_last:
            self.epoch += 1
        if self.epoch == settings.update_epochs:
            self.rollout, self.epoch = {}, 0
        with torch.no_grad():
            metrics |= {
                "train/loss": loss.detach(),
                "train/policy_loss": policy_loss.detach(),
                "train/value_loss": value_loss.detach(),
                "train/entropy": entropy.detach(),
                "train/span_loss": span_loss.detach(),
                "train/approx_kl": ((ratio - 1 - log_ratio) * weight).mean(),
                "train/clip_fraction": (((ratio - 1).abs() > settings.clip_coef) * weight).mean(),
            }
            self.averager.add_share(metrics, share, is_first=index == 0)
        return (loss + span_loss) * share

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
        num_envs, block_size, span_cap = config.eval.batch_size, config.eval.block_size, config.eval.span_cap
        streams = own_streams(num_envs, "eval.batch_size")
        envs = own_envs(task, num_envs, device, split)
        generator = torch.Generator(device).manual_seed(config.seed)
        sampler = ActionSampler(generator, streams, num_envs, task.action_distribution)
        states = evaluation_states(model, config, streams.stop - streams.start)
        averager = RunningMeans()
        with autocast(config, device):
            actor = Actor(model, states, span_cap)
        by_distance = AccuracyByDistance(device, model.max_reach(span_cap))
        steps_left = config.eval.max_blocks * block_size  # in which counted episodes may begin
        while steps_left > 0 or max_numbers([(envs.steps > -steps_left).any().item()])[0]:
            with autocast(config, device):
                rollout, episodes = collect_rollout(actor, envs, sampler, block_size, steps_left, by_distance)
            averager.add(episodes | actor.pop_metrics(num_envs))
            if max_numbers([not rollout["log_prob"].isfinite().all()])[0]:
                raise ValueError(
                    f"{split}: no action can be sampled; the weights have diverged: try a lower optimizer.lr"
                )
            steps_left -= block_size
        by_distance.sum_over_ranks()
        metrics = per_episode(averager.means())
        metrics |= by_distance.beyond_reach()
        metrics |= {f"rl/success_{name}": value for name, value in by_distance.accuracies().items()}
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "envs": {name: value for name, value in self.envs.state_dict().items() if name != "per_env"},
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "blocks": self.blocks,
            "progress": self.progress.values(),
        }

    def streams_state_dict(self) -> dict[str, Any]:
        """What belongs to this rank's environments, tensors (B, ...)."""
        return {"envs": self.envs.state_dict()["per_env"], "rollout": self.rollout}

    def load_state_dict(self, state: dict[str, Any], streams_state: dict[str, Any]) -> None:
        self.envs.load_state_dict({**state["envs"], "per_env": streams_state["envs"]})
        self.generator.set_state(state["generator"].cpu())
        self.rollout = {name: tensor.to(self.device) for name, tensor in streams_state["rollout"].items()}
        if self.rollout and "weight" not in self.rollout:  # it was saved before there were weights
            self.rollout["weight"] = torch.ones_like(self.rollout["advantage"])
        self.epoch, self.blocks = state["epoch"], state["blocks"]
        self.progress.load_values(state["progress"])


class ActionSampler:
    """What actions are sampled by: the task's distribution, and the random numbers for it.

    The numbers are drawn for the environments of all ranks, and those of the own ones kept, so that ranks act as one
    process.
    """

    def __init__(
        self, generator: torch.Generator, streams: slice, num_envs: int, distribution: Distribution = Categorical
    ):
        self.generator, self.streams, self.num_envs, self.distribution = generator, streams, num_envs, distribution

    def exponential(self, like: Tensor) -> Tensor:
        """Exponentially distributed noise, of the shape of `like` (B, n)."""
        return like.new_empty(self.num_envs, like.shape[1]).exponential_(generator=self.generator)[self.streams]

    def normal(self, like: Tensor) -> Tensor:
        """Normally distributed noise, of the shape of `like` (B, n)."""
        return like.new_empty(self.num_envs, like.shape[1]).normal_(generator=self.generator)[self.streams]


def own_envs(task: RLTask, num_envs: int, device: torch.device, split: str, **options: Any) -> Envs:
    """This rank's share of the environments. Only several ranks need a task that can divide them."""
    if world_size() == 1:
        return task.make_envs(num_envs, device, split=split, **options)
    streams = own_streams(num_envs, "the number of environments")
    options |= {"first": streams.start, "total": num_envs}
    return task.make_envs(streams.stop - streams.start, device, split=split, **options)


class Actor:
    """The model in all environments of this rank, timestep by timestep.

    Args:
        model: What acts; compiled or not, it acts uncompiled.
        states: Of each micro-batch; they stay as they are.
        span_cap: Timesteps: spans longer than this are shortened to it (None: no limit).
    """

    def __init__(self, model: Any, states: MicroBatches, span_cap: int | None = None):
        model.eval()
        self.rows = states.rows
        self.decoders = [Decoder(getattr(model, "_orig_mod", model), state, span_cap) for state in states]

    def __call__(self, observation: Tensor, reach: Tensor) -> Tensor:
        """Observe one timestep: (B, vocab_size) and (B,) to the model's outputs (B, num_classes)."""
        parts = zip(self.decoders, self.rows, strict=True)
        return torch.cat([decoder(observation[rows], reach[rows]) for decoder, rows in parts])

    def pop_metrics(self, num_envs: int) -> Metrics:
        """The memory metrics since the last call: this rank's share of their means over `num_envs` environments."""
        shares: Metrics = defaultdict(float)
        for decoder, rows in zip(self.decoders, self.rows, strict=True):
            for name, value in decoder.pop_metrics().items():
                shares[name] += value * (rows.stop - rows.start) / num_envs
        return shares


@torch.no_grad()
def collect_rollout(
    actor: Actor,
    envs: Envs,
    sampler: ActionSampler,
    num_steps: int,
    max_start_step: float = math.inf,
    by_distance: AccuracyByDistance | None = None,
) -> tuple[Rollout, Metrics]:
    """Act for num_steps timesteps, sampling from the policy.

    Args:
        max_start_step: Count only episodes that begin fewer than this many timesteps from now.
        by_distance: receives the success of each counted episode, where the task knows a distance.

    Returns:
        the rollout without its next_value, and the metrics of episodes: this rank's share of them (see `per_episode`).
    """
    steps, infos = [], []
    for _ in range(num_steps):
        observation, reach, resetting = envs.observe(), envs.steps, envs.resetting  # (B, vocab_size), (B,), (B,)
        policy, value = policy_and_value(actor(observation, reach), sampler.distribution)
        action = policy.sample(sampler)  # (B,), or (B, k)
        reward, done = envs.step(action)  # (B,), (B,)
        infos.append(envs.episode_info)
        steps.append({
            "observation": observation,
            "reach": reach,
            "action": action,
            "log_prob": policy.log_prob(action),
            "value": value,
            "reward": reward,
            "done": done,
            "resetting": resetting,
        })  # fmt: skip
    rollout = stack_timesteps(steps)
    info = stack_timesteps(infos)
    rollout["truncated"] = rollout["done"] & info["truncated"]
    start_step = torch.arange(1, num_steps + 1, device=info["episode_length"].device) - info["episode_length"]  # (B, T)
    counted = rollout["done"] & (start_step < max_start_step)  # (B, T)
    if by_distance and "distance" in info:
        by_distance.add(info["success"], counted, info["distance"])
    episodes = {f"rl/{name}": (value.float() * counted).sum(0).mean() for name, value in info.items()}
    episodes["rl/episodes"] = counted.float().sum(0).mean()
    return rollout, dict(zip(episodes, to_numbers(list(episodes.values())), strict=True))


def stack_timesteps(timesteps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack what there is of each timestep, (B, ...), to (B, T, ...)."""
    return {name: torch.stack([values[name] for values in timesteps], 1) for name in timesteps[0]}


def policy_and_value(outputs: Tensor, distribution: Distribution) -> tuple[ActionDistribution, Tensor]:
    """Split model outputs (..., num_classes) into the policy and the value (...)."""
    outputs = at_least_float32(outputs)
    return distribution(outputs[..., :-1]), outputs[..., -1]


def add_advantages(rollout: Rollout, settings: DictConfig) -> None:
    """Add advantages, returns and weights, (B, T) each.

    Advantages are normalized over the environments of all ranks, if the settings say so. Timesteps in which no action
    was taken have weight 0, all others the same, of which the mean over all ranks is 1.
    """
    advantages = compute_gae(rollout, settings.discount, settings.gae_lambda, settings.bootstrap_truncated)
    rollout["return"] = advantages + rollout["value"]
    acted = (~rollout["resetting"]).to(advantages.dtype)  # (B, T)
    count, size = (sum_tensor(values.sum()) for values in (acted, torch.ones_like(acted)))
    if settings.normalize_advantage:
        centered = advantages - sum_tensor((advantages * acted).sum()) / count
        std = (sum_tensor((centered * acted).square().sum()) / (count - 1)).sqrt()
        advantages = centered / (std + 1e-8)
    rollout["advantage"] = advantages
    rollout["weight"] = acted * (size / count)


def compute_gae(rollout: Rollout, discount: float, gae_lambda: float, bootstrap_truncated: bool = False) -> Tensor:
    """Generalized advantage estimates (B, T); no advantage is propagated across the end of an episode.

    Args:
        bootstrap_truncated: whether the value after a truncated episode counts, which is that of its last observation.
    """
    terminated = rollout["done"] & ~rollout["truncated"] if bootstrap_truncated else rollout["done"]  # (B, T)
    advantages, next_value = torch.zeros_like(rollout["value"]), rollout["next_value"]
    next_advantage = torch.zeros_like(next_value)  # (B,)
    for t in reversed(range(advantages.shape[1])):
        nonterminal, not_done = ((~ended[:, t]).to(next_value.dtype) for ended in (terminated, rollout["done"]))
        td_error = rollout["reward"][:, t] + discount * next_value * nonterminal - rollout["value"][:, t]
        next_advantage = td_error + discount * gae_lambda * not_done * next_advantage
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
