"""Any environment of Gymnasium, or of your own that has its interface: task=gymnasium task.id=CartPole-v1.

The model sees each observation as a row of numbers, and acts by a distribution that follows from the action space:
categorical for Discrete, several independent ones for MultiDiscrete and MultiBinary, Gaussian for Box.

Environments reset in the step after the end of an episode (Gymnasium's AutoresetMode.NEXT_STEP): the model sees the
last observation, takes no action, and learns nothing from it but the value beyond a time limit.
"""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .actions import ActionDistribution
from .base import SPLITS, AutoresetMode, Envs, RLTask, View

METRICS = ("episode_return", "episode_length", "success")
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")  # colors
VECTORIZATION_MODES = ("sync", "async", "vector_entry_point")


class GymnasiumTask(RLTask):
    """Environments made by `gymnasium.make_vec`.

    Keys of `episode_info`: episode_return (of rewards that are not normalized), episode_length, truncated; and with
    metric="success" success, which infos have as `is_success` or `success` when an episode ends.

    Args:
        id: As Gymnasium has it, such as CartPole-v1, or MODULE:ID, where importing the module registers the id; or
            MODULE:FUNCTION, a function or class of your own that gives one environment.
        kwargs: Arguments of the environment.
        wrappers: Of each environment, the innermost first: its class as `_target_`, a subclass of gymnasium.Wrapper,
            and its arguments.
        vectorization_mode: "sync", "async" (a process for each environment), or "vector_entry_point", the environment's
            own vectorization.
        normalize_observation: Whether each number of an observation is centered and divided by its standard deviation,
            as `gymnasium.wrappers.vector.NormalizeObservation` does it, and clipped at 10 of these. Evaluation uses
            what training has found.
        normalize_reward: Whether rewards are divided in training by the standard deviation of the discounted return, as
            `gymnasium.wrappers.vector.NormalizeReward` does it.
        discount: That of the return by which rewards are normalized.
        metric: The result that is reported: "episode_return", "episode_length" or "success".
        seed: Seed of the environments.

    Raises:
        ValueError: without Gymnasium; for an id, an argument or a space that cannot be used.
    """

    def __init__(
        self,
        id: str,
        kwargs: dict[str, Any] | None = None,
        wrappers: list[dict[str, Any]] | None = None,
        vectorization_mode: str = "sync",
        normalize_observation: bool = False,
        normalize_reward: bool = False,
        discount: float = 0.99,
        metric: str = "episode_return",
        seed: int = 0,
    ):
        try:
            from . import gymnasium_envs
        except ImportError as error:
            raise ValueError(f"task=gymnasium needs Gymnasium: pip install 'expire-span[rl]' ({error})") from None
        for key, value, choices in (
            ("metric", metric, METRICS),
            ("vectorization_mode", vectorization_mode, VECTORIZATION_MODES),
        ):
            if value not in choices:
                raise ValueError(f"task.{key} must be one of {', '.join(choices)}, got {value}")
        self.id, self.vectorization_mode, self.seed = id, vectorization_mode, seed
        self.normalize_observation, self.normalize_reward = normalize_observation, normalize_reward
        self.discount, self.metric, self.progress_metric = discount, metric, metric
        self.kwargs: Mapping[str, Any] = dict(kwargs or {})
        self.wrappers: Sequence[Any] = [gymnasium_envs.wrapper(*each) for each in enumerate(wrappers or ())]
        self.spec = gymnasium_envs.find_spec(id)
        one = gymnasium_envs.make_vector_env(self, 1)
        self.observations = gymnasium_envs.observation_layout(id, one.single_observation_space)
        self.actions = gymnasium_envs.action_kind(id, one.single_action_space)
        self.render_modes: Sequence[str] = one.metadata.get("render_modes") or ()
        one.close()
        self.vocab_size, self.num_classes = self.observations.size, self.actions.num_outputs + 1
        self.observation_rms = gymnasium_envs.RunningMeanStd(shape=(self.vocab_size,), dtype=np.float32)  # in training

    def action_distribution(self, outputs: Tensor) -> ActionDistribution:
        return self.actions.distribution(outputs)

    def make_envs(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        split: str = "train",
        first: int = 0,
        total: int | None = None,
        autoreset_mode: AutoresetMode = "next_step",
    ) -> Envs:
        """See `RLTask`. Whatever `autoreset_mode` says, they reset in the next step.

        Raises:
            ValueError: where several processes would have to share what they do not: running statistics, or an
                environment's own vectorization.
        """
        from . import gymnasium_envs

        for key, is_shared in (
            ("normalize_observation=true", self.normalize_observation),
            ("normalize_reward=true", self.normalize_reward),
            ("vectorization_mode=vector_entry_point", self.vectorization_mode == "vector_entry_point"),
        ):
            if total not in (None, num_envs) and is_shared:
                raise ValueError(f"task.{key} works in one process only; with several, do without it")
        return gymnasium_envs.GymnasiumEnvs(self, num_envs, torch.device(device), (SPLITS.index(split), seed), first)

    def make_env_to_watch(self, device: torch.device | str, seed: int, with_image: bool) -> Envs:
        """See `RLTask`: Gymnasium's render_mode is rgb_array for an image, or ansi, if the environment has it."""
        watched = copy(self)
        for mode in ("rgb_array", "ansi") if with_image else ("ansi",):
            if mode in self.render_modes and "render_mode" not in watched.kwargs:
                watched.kwargs = {**self.kwargs, "render_mode": mode}
        return watched.make_envs(1, device, seed, "test")

    def view(self, envs: Envs, width: int) -> View:
        """See `RLTask`."""
        from . import gymnasium_envs

        assert isinstance(envs, gymnasium_envs.GymnasiumEnvs)
        caption = f"{self.id}, step {int(envs.steps[0])}, return {envs.statistics.episode_returns[0]:.4g}"
        picture = envs.render()
        if isinstance(picture, str):
            return View(TERMINAL_CODES.sub("", picture).splitlines(), None, caption)
        return View([], picture, caption)

    def describe_action(self, action: Tensor) -> tuple[str, str]:
        env_action = torch.as_tensor(self.actions.to_env(action.cpu().numpy()))  # (1,) or (1, ...)
        return super().describe_action(env_action.flatten(1) if env_action.dim() > 1 else env_action)

    def state_dict(self) -> dict[str, Any]:
        from . import gymnasium_envs

        if not self.normalize_observation:
            return {}
        return {"observations": gymnasium_envs.statistics_of(self.observation_rms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from . import gymnasium_envs

        if self.normalize_observation:
            gymnasium_envs.load_statistics(self.observation_rms, state["observations"])

    def eval_state_dict(self) -> dict[str, Any]:
        return self.state_dict()
