"""What `GymnasiumTask` makes of Gymnasium: environments, layouts of observations, kinds of actions, errors."""

import difflib
import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv, VectorObservationWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward, RecordEpisodeStatistics
from hydra.utils import get_class
from torch import Tensor

from .actions import ActionDistribution, Categorical, Gaussian, MultiCategorical
from .base import EnvError, EnvValueError

if TYPE_CHECKING:
    from .gymnasium_task import GymnasiumTask

log = logging.getLogger(__name__)
CLIP = 10.0  # standard deviations, of normalized observations: what is rare would be very large
STATISTICS = "expire_span_episode"  # the key of infos for returns and lengths; wrappers may use "episode"


class Layout(NamedTuple):
    """Observations as rows of numbers."""

    size: int
    flatten: Callable[[Any], np.ndarray]  # a batch of observations -> (B, size) float32


class ActionKind(NamedTuple):
    """How the model acts."""

    num_outputs: int
    distribution: Callable[[Tensor], ActionDistribution]
    to_env: Callable[[np.ndarray], np.ndarray]  # of what the distribution samples


def find_spec(id: str) -> str | EnvSpec:
    """What `gymnasium.make_vec` takes. Raises ValueError for a name that there is not, with names like it."""
    module_name, _, name = id.rpartition(":")
    if module_name:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"task.id={id}: {module_name} cannot be imported ({error})") from error
        if name not in gymnasium.registry and callable(getattr(module, name, None)):
            return EnvSpec(f"{name}-v0", entry_point=getattr(module, name))
    known = name in gymnasium.registry or any(key.startswith(f"{name}-v") for key in gymnasium.registry)
    if not known:
        close = difflib.get_close_matches(name, gymnasium.registry, n=3)
        advice = f"did you mean {' or '.join(close)}?" if close else "gymnasium.pprint_registry() lists them."
        where = f"{module_name} has no function {name}, and " if module_name else ""
        raise ValueError(
            f"task.id={id}: {where}no environment is called {name}; {advice} MODULE:NAME imports the module first"
        )
    return id


def wrapper(index: int, config: Any) -> Callable[[gymnasium.Env], gymnasium.Env]:
    """A wrapper of the config. Raises ValueError if it is not a class of wrappers."""
    arguments = dict(config)
    target = arguments.pop("_target_", None)
    key = f"task.wrappers[{index}]._target_"
    try:
        wrapper_class = get_class(target)
    except Exception:
        raise ValueError(f"{key} must name a class that can be imported, got {target}") from None
    if not issubclass(wrapper_class, gymnasium.Wrapper):
        raise ValueError(f"{key}={target} must be a subclass of gymnasium.Wrapper")
    return partial(wrapper_class, **arguments)


def make_vector_env(task: "GymnasiumTask", num_envs: int) -> VectorEnv:
    """The environments, which reset in the step after an episode's end. Raises ValueError if there can be none."""
    mode, name = task.vectorization_mode, f"task.id={task.id}"
    try:
        env = gymnasium.make_vec(
            task.spec, num_envs, vectorization_mode=mode, wrappers=list(task.wrappers), **task.kwargs
        )
    except Exception as error:  # of as many kinds as there are environments
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name}: {num_envs} environments cannot be made by {mode} ({reason})") from error
    found = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    if found != AutoresetMode.NEXT_STEP:
        raise ValueError(f"{name} has autoreset_mode {found}, not NEXT_STEP; use task.vectorization_mode=sync")
    return env


def observation_layout(id: str, space: spaces.Space, key: str = "") -> Layout:
    """As `gymnasium.spaces.flatten`, for batches; pixels (uint8) are divided by 255.

    Raises:
        ValueError: for other spaces than Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these.
    """
    match space:
        case spaces.Box():
            scale = 255 if space.dtype == np.uint8 else 1
            return Layout(int(np.prod(space.shape)), lambda batch: batch.reshape(len(batch), -1) / np.float32(scale))
        case spaces.Discrete():
            return Layout(int(space.n), lambda batch: one_hot(batch - space.start, int(space.n)))
        case spaces.MultiDiscrete():
            sizes, start = space.nvec.flatten().tolist(), space.start.flatten()

            def flatten(batch: np.ndarray) -> np.ndarray:
                columns = (batch.reshape(len(batch), -1) - start).T
                return np.concatenate([one_hot(*each) for each in zip(columns, sizes, strict=True)], 1)

            return Layout(sum(sizes), flatten)
        case spaces.MultiBinary():
            return Layout(int(np.prod(space.shape)), lambda batch: batch.reshape(len(batch), -1))
        case spaces.Dict():
            named: list[tuple[Any, spaces.Space]] = list(space.spaces.items())
        case spaces.Tuple():
            named = list(enumerate(space.spaces))
        case _:
            raise ValueError(
                f"task.id={id}: observation{key} is of a {type(space).__name__} space; those that can be used are Box, "
                "Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these; task.wrappers can leave it out"
            )
    parts = {name: observation_layout(id, part, f"{key}[{name!r}]") for name, part in named}
    return Layout(
        sum(part.size for part in parts.values()),
        lambda batch: np.concatenate([part.flatten(batch[name]) for name, part in parts.items()], 1),
    )


def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    """(B,) -> (B, size)."""
    return np.eye(size, dtype=np.float32)[index]


def action_kind(id: str, space: spaces.Space) -> ActionKind:
    """Raises ValueError for other spaces than Discrete, MultiDiscrete, MultiBinary, and Box of floats."""
    match space:
        case spaces.Discrete():
            return ActionKind(int(space.n), Categorical, lambda action: action + space.start)
        case spaces.MultiDiscrete() | spaces.MultiBinary():
            counts = space.nvec if isinstance(space, spaces.MultiDiscrete) else np.full(space.shape, 2)
            sizes, start = counts.flatten().tolist(), getattr(space, "start", 0)
            return ActionKind(
                sum(sizes),
                lambda outputs: MultiCategorical(outputs, sizes),
                lambda action: (action.reshape(-1, *space.shape) + start).astype(space.dtype),
            )
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            bounded = np.isfinite(space.low) & np.isfinite(space.high)
            low, high = np.where(bounded, space.low, -1.0), np.where(bounded, space.high, 1.0)
            center, half = (low + high) / 2, (high - low) / 2  # -1 and 1 become the bounds, if there are two

            def to_env(action: np.ndarray) -> np.ndarray:
                scaled = center + half * np.nan_to_num(action).reshape(-1, *space.shape)  # nan: training has diverged
                return np.clip(scaled, space.low, space.high).astype(space.dtype)

            return ActionKind(2 * int(np.prod(space.shape)), Gaussian, to_env)
    raise ValueError(
        f"task.id={id}: the action space is a {type(space).__name__} ({space}); those that can be used are Discrete, "
        "MultiDiscrete, MultiBinary, and Box of floats"
    )


class FlatObservations(VectorObservationWrapper):
    """Observations as rows of numbers, (B, size) float32."""

    def __init__(self, env: VectorEnv, layout: Layout):
        super().__init__(env)
        self.layout = layout
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (layout.size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def observations(self, observations: Any) -> np.ndarray:
        return self.layout.flatten(observations).astype(np.float32)


class GymnasiumEnvs:
    """See `tasks.base.Envs`. They compute on the CPU.

    Episodes cannot be saved. Where a state is loaded, new ones begin, with a seed that depends on how many steps have
    been taken.

    Args:
        key: what distinguishes these environments from others of the task: the number of the split, and a seed.
        first: the number of the first of these environments, of which each has a seed of its own.
    """

    def __init__(self, task: "GymnasiumTask", num_envs: int, device: torch.device, key: tuple[int, int], first: int):
        self.task, self.num_envs, self.device, self.key, self.first = task, num_envs, device, key, first
        self.train = key[0] == 0
        self.statistics = RecordEpisodeStatistics(make_vector_env(task, num_envs), stats_key=STATISTICS)
        env: Any = FlatObservations(self.statistics, task.observations)
        if task.normalize_observation:
            env = NormalizeObservation(env)
            env.obs_rms, env.update_running_mean = task.observation_rms, self.train
        self.reward_rms = None
        if task.normalize_reward and self.train:
            env = NormalizeReward(env, gamma=task.discount)
            self.reward_rms = env.return_rms
        self.env = env
        self.num_steps = 0
        self.begin_episodes()

    def begin_episodes(self) -> None:
        """Begin new episodes everywhere."""
        entropy = np.random.SeedSequence([self.task.seed, *self.key, self.num_steps])
        seed = int(entropy.generate_state(1)[0] >> 2) + self.first  # some environments take 31 bits
        try:
            observations, _ = self.env.reset(seed=seed)
        except Exception as error:
            raise EnvError(f"{self.task.id} has raised an error in its first reset") from error
        self.steps = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.resetting = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.episode_info: dict[str, Tensor] = {}
        self.take(observations)

    def take(self, observations: np.ndarray) -> None:
        """Keep the observations (B, vocab_size) until the next step."""
        self.check_finite("observation", observations)
        if self.task.normalize_observation:
            observations = observations.clip(-CLIP, CLIP)
        self.observation = torch.as_tensor(observations, device=self.device)

    def check_finite(self, what: str, values: np.ndarray) -> None:
        """Raises EnvValueError for the first environment that has given a number that is none."""
        wrong = ~np.isfinite(values).reshape(self.num_envs, -1).all(1)
        if wrong.any():
            env = self.first + int(wrong.argmax())
            raise EnvValueError(
                f"{self.task.id} has given {what}s that are not finite, in environment {env} at step {self.num_steps}"
            )

    def observe(self) -> Tensor:
        """(B, vocab_size) float32."""
        return self.observation

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take actions as the task's distribution samples them.

        Returns:
            reward: (B,) float32.
            done: (B,) bool.

        Raises:
            EnvError: with what an environment has raised as its cause.
            EnvValueError: for an observation or a reward that is not finite.
        """
        self.num_steps += 1
        try:
            observations, reward, terminated, truncated, infos = self.env.step(
                self.task.actions.to_env(action.cpu().numpy())
            )
        except Exception as error:
            raise EnvError(f"{self.task.id} has raised an error at step {self.num_steps}") from error
        self.check_finite("reward", reward)
        self.take(observations)
        done = terminated | truncated
        ended = infos.get(STATISTICS, {"r": np.zeros(self.num_envs), "l": np.zeros(self.num_envs, np.int64)})
        self.episode_info = {
            "episode_return": self.tensor(ended["r"], torch.float32),
            "episode_length": self.tensor(ended["l"], torch.int64),
            "truncated": self.tensor(truncated & ~terminated, torch.bool),
        }
        if self.task.metric == "success":
            self.episode_info["success"] = self.tensor(self.success(infos, done), torch.float32)
        self.steps = torch.where(self.resetting, 0, self.steps + 1)
        self.resetting = self.tensor(done, torch.bool)
        return self.tensor(reward, torch.float32), self.resetting

    def render(self) -> str | np.ndarray | None:
        """The first environment as text or as an image (rows, columns, 3) uint8, or None without a render_mode.

        Raises:
            ValueError: if it fails, for example for lack of a library.
        """
        if "render_mode" not in self.task.kwargs:
            return None
        try:
            pictures = self.env.render()
        except Exception as error:
            raise ValueError(f"{self.task.id} cannot be drawn: {error}") from error
        if pictures is None or pictures[0] is None:
            return None
        return pictures[0] if isinstance(pictures[0], str) else np.asarray(pictures[0], np.uint8)

    def success(self, infos: dict[str, Any], done: np.ndarray) -> np.ndarray:
        """Whether the episodes that ended did so well (B,). Raises EnvValueError if the infos do not tell."""
        for key in ("is_success", "success"):
            if key in infos and infos[f"_{key}"][done].all():
                return np.where(done, infos[key], 0).astype(np.float32)
        if done.any():
            names = [name for name in infos if not name.startswith("_") and name != STATISTICS]
            raise EnvValueError(
                f"task.metric=success needs is_success or success in the infos of {self.task.id} when an episode ends, "
                f"which have {', '.join(names) or 'nothing'}; use task.metric=episode_return"
            )
        return np.zeros(self.num_envs, np.float32)

    def tensor(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        reward = statistics_of(self.reward_rms) if self.reward_rms else {}
        return {"num_steps": self.num_steps, "reward_statistics": reward, "per_env": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        log.info(f"the episodes of {self.task.id} cannot be saved: new ones begin, with another seed")
        self.num_steps = state["num_steps"]
        if self.reward_rms:
            load_statistics(self.reward_rms, state["reward_statistics"])
        self.begin_episodes()


def statistics_of(rms: RunningMeanStd) -> dict[str, Any]:
    """Running statistics as plain values."""
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def load_statistics(rms: RunningMeanStd, statistics: dict[str, Any]) -> None:
    dtype = np.asarray(rms.mean).dtype
    rms.mean, rms.var = (np.asarray(statistics[name], dtype) for name in ("mean", "var"))
    rms.count = statistics["count"]
