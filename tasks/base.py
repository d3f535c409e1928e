"""What a task provides to the training loop.

To write a task of your own, subclass `Task` and define five members; everything else has a default:

    class Parity(Task):
        vocab_size = 2            # number of distinct input tokens
        num_classes = 2           # number of distinct answers; vocab_size for a language model
        metric = "accuracy"       # one of METRICS
        scoring = "token"         # one of SCORINGS

        def stream(self, split, batch_size, block_size):
            return ParityStream(...)          # an iterator of Batch, see Stream

and train on it with `task._target_=my_module.Parity`. Keys below `task` are the constructor's arguments.
A reinforcement-learning task, in which the model acts in environments, subclasses `RLTask` instead.
"""

import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .actions import ActionDistribution, Categorical

SPLITS = ("train", "valid", "test")
METRICS = ("bpb", "bpc", "ppl", "accuracy", "error")  # bits per byte or character, perplexity; shares from 0 to 1
LOWER_IS_BETTER = ("bpb", "bpc", "ppl", "error")  # of all other metrics, also an RLTask's, more is better
DIGITS = string.digits + string.ascii_lowercase
SCORINGS = ("token", "sequence", "line")
AutoresetMode = Literal["same_step", "next_step"]
IGNORE_INDEX = -100  # a target that is not scored, as in torch.nn.functional.cross_entropy


class Batch(NamedTuple):
    """One block of T timesteps of B parallel streams, on the CPU."""

    tokens: Tensor  # (B, T) int64; or (B, T, F): F fields per timestep, whose embeddings are summed
    targets: Tensor  # (B, T) int64, IGNORE_INDEX where nothing is scored
    reach: Tensor | None = None  # (B, T) int64: timesteps since the episode began; None: a single endless episode
    answer_distance: Tensor | None = None  # (B, T) int64: timesteps back to what the scored target depends on
    answer_id: Tensor | None = None  # (B, T) int64: number of the answer that a target is part of; -1: none


class Stream(Protocol):
    """An iterator of batches that can be saved and resumed in the middle.

    Row b of every batch continues row b of the batch before it. Training streams never end; the others end with
    StopIteration.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EnvError(RuntimeError):
    """An environment has raised an error, its cause. A run that it ends is saved first, and shows the traceback."""


class EnvValueError(EnvError, ValueError):
    """An environment has given what cannot be learned from. A run that it ends is saved first, and says so."""


class TaskDefaults:
    """Members that every task has, with defaults for the optional ones."""

    vocab_size: int
    num_classes: int
    metric: str
    vocab: Sequence[str] | None = None  # the character or word of each token: a str of characters or a list of words
    data_info: Mapping[str, Any] | None = None  # what the summary of a run says about its data
    curriculum_stage: float | None = None  # difficulty of the training episodes that begin from now on; None: constant

    def update_curriculum(self, progress: float) -> None:
        """Make training harder once the model has learned enough. Called every `train.curriculum_interval` updates.

        Args:
            progress: Mean training accuracy (an `RLTask`: mean of its `progress_metric`) since the last call;
                nan where nothing was scored.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint saves of the task, such as its curriculum stage."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or `eval_state_dict`."""

    def eval_state_dict(self) -> dict[str, Any]:
        """What evaluation needs beside the weights, with which it is saved: numbers and lists, such as statistics."""
        return {}


class Task(TaskDefaults, ABC):
    """A task in which the model predicts the targets of a stream of tokens.

    `metric` is the result that is reported, one of METRICS. `scoring` tells what counts as one answer:
        "token"       each target on its own
        "sequence"    all targets of a stream's block together: right only if all of them are
        "line"        all targets with the same Batch.answer_id together, across blocks
    """

    scoring: Literal["token", "sequence", "line"]
    extra_metrics: tuple[str, ...] = ()  # further METRICS to report, such as "bpc"

    @abstractmethod
    def stream(self, split: str, batch_size: int, block_size: int) -> Stream:
        """Return `batch_size` parallel streams of one of SPLITS, in blocks of `block_size` timesteps."""

    def bytes_per_token(self, split: str) -> float:
        """Mean UTF-8 bytes of a target: bits per byte are bits per token divided by it."""
        return 1.0


class Envs(Protocol):
    """Environments that step together, as tensors on one device; an episode that ends is followed by a new one.

    The new one begins either at once (Gymnasium's AutoresetMode.SAME_STEP), or in the next step (NEXT_STEP): then the
    last observation of the old one is seen for a timestep, in which no action is taken.
    """

    num_envs: int

    @property
    def episode_info(self) -> Mapping[str, Tensor]:
        """After a step, (B,) each, to be read where the step ended the episode.

        episode_return, episode_length (timesteps), truncated (bool: ended by a limit of time alone), and others.
        """
        ...

    @property
    def resetting(self) -> Tensor:
        """(B,) bool: which environments show the last observation of an episode, and will ignore the next action."""
        ...

    @property
    def steps(self) -> Tensor:
        """(B,) int64: timesteps since each episode began; 0 at its first observation."""
        ...

    def observe(self) -> Tensor:
        """(B, vocab_size) float32: the current observations."""
        ...

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take actions (B,) int64, or as the task's distribution has them.

        Returns:
            The rewards, (B,) float32, and where an episode was terminated or truncated in this step, (B,) bool.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on.

        "per_env" is a dictionary of tensors (B, ...): each environment's own state. The rest, such as the state of a
        random number generator, is the same in all processes.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class View(NamedTuple):
    """What one environment looks like at a timestep, for those who watch."""

    text: list[str]  # lines, such as those of a map; none if there is only an image
    image: np.ndarray | None  # (rows, columns, 3) uint8
    caption: str
    observed: str = ""  # one character for what the agent observes; of a task, all views have one or none has


class RLTask(TaskDefaults, ABC):
    """A task in which the model acts in environments, and is trained by actor-critic.

    `vocab_size` is the length of an observation. `num_classes` is the number of the model's outputs: what
    `action_distribution` takes, by default one logit for each action, and last the value. `metric` is any key of
    `Envs.episode_info`.
    """

    progress_metric: str  # the key of Envs.episode_info whose mean `update_curriculum` receives

    def action_distribution(self, outputs: Tensor) -> ActionDistribution:
        """The policy, from the model's outputs without the value: (..., num_classes - 1)."""
        return Categorical(outputs)

    @abstractmethod
    def make_envs(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        split: str = "train",
        first: int = 0,
        total: int | None = None,
        autoreset_mode: AutoresetMode = "same_step",
    ) -> Envs:
        """Return `num_envs` environments at the start of their first episodes.

        Args:
            seed: Number that distinguishes several sets of environments of one split within a run.
            split: One of SPLITS: "train" follows the curriculum; "valid" and "test" are at full difficulty.
            first, total: Given where several processes share `total` environments: these are the ones from number
                `first` on, and must behave as they do in a process that has all.
            autoreset_mode: When an episode that ended is followed by a new one, see `Envs`. "next_step" is given only
                with `actor_critic.bootstrap_truncated`, which needs the last observations.
        """

    def make_env_to_watch(self, device: torch.device | str, seed: int, with_image: bool) -> Envs:
        """One environment of the test split. Its views have an image rather than text if `with_image`, if it can."""
        return self.make_envs(1, device, seed=seed, split="test")

    def view(self, envs: Envs, width: int) -> View:
        """What the first of `envs` looks like, in text of at most `width` columns if it is a map."""
        return View([], None, f"step {int(envs.steps[0])}")

    def describe_action(self, action: Tensor) -> tuple[str, str]:
        """What the first environment is told to do, by actions (1,) or (1, k): one character, and words."""
        if action.dim() > 1:
            return "·", f"does ({', '.join(f'{number:.3g}' for number in action[0].tolist())})"
        number = int(action)
        return (DIGITS[number] if 0 <= number < len(DIGITS) else "·"), f"does {number}"
