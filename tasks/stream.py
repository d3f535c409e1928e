"""What a task hands to the runner: batches of blocks, B streams side by side, block after block in time.

A task is any object with these five:

    vocabulary: int      number of different input tokens
    classes: int         number of different answers (the vocabulary, for a language model)
    measure: str         "bpb", "ppl", "accuracy" or "error": what its figure is
    answer: str          "token": each target counts alone; "block": the targets of a stream's block are one answer;
                         "line": those of one number in Batch.answer are, wherever blocks end
    stream(split, batch, block) -> Stream      "train" is endless; "valid" and "test" end with StopIteration

and, where it grows harder as the model learns, `feedback(accuracy)` (not a number unless measure is accuracy or error),
`state_dict()` and `load_state_dict()`; where its measure is "bpb", `bytes_per_token(split)`: bits per token divided by
it are bits per byte; `also`, the names of further measures to be told beside, such as "bpc"; `alphabet`, the characters
or words that its tokens stand for, saved with a run; `data`, what a run's summary says of its data.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

SPLITS = ("train", "valid", "test")
IGNORED = -100  # a target that is not asked for, as in torch.nn.functional.cross_entropy


class Batch(NamedTuple):
    """One block of B streams, on the CPU."""

    tokens: Tensor  # (B, T) int64; or (B, T, F): F fields a timestep, whose embeddings are summed
    targets: Tensor  # (B, T) int64, IGNORED where nothing is asked
    reach: Tensor | None = None  # (B, T) int64: timesteps since the episode began; None: one endless episode
    distance: Tensor | None = None  # (B, T) int64: how far back the answer lies, where a target is asked
    answer: Tensor | None = None  # (B, T) int64: the answer that a target belongs to, counting up in a stream; -1: none


class Stream(Protocol):
    """An iterator of batches that can be saved in the middle and go on there."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
