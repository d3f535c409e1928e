"""The interface of a memory mechanism; everything else in a model is shared (section 5.1)."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..checks import check_integers
from .packed import Memory

Mass = Callable[[slice], Tensor]  # see `Mechanism.keep`


class Mechanism(nn.Module):
    """How long the memories of one layer live, and what that costs.

    Attention masks each memory by its span and the ramp (section 4.1), and the layer deletes it once no later query can
    see it. A mechanism of your own defines `span`, and optionally `loss` and `pool`; `log_gate` or `score_bias`, by
    which memories get less weight as they age; and `keep`, which deletes some before their span is over. One learned
    span per layer:

        class LayerSpan(Mechanism):
            def __init__(self, max_span, ramp, alpha):
                super().__init__(max_span, ramp, num_positions=max_span)
                self.alpha = alpha
                self.logit = nn.Parameter(torch.zeros(1, 1))

            def span(self, memory):  # (1, 1): the same for all memories and heads
                return self.max_span * torch.sigmoid(self.logit)

            def loss(self, span, nearest, farthest, batch_size, block_size):
                return self.alpha * span.mean()

    Args:
        max_span: L, timesteps.
        ramp: R, timesteps over which a memory fades. A ramp of 1 with integer spans is a hard edge.
        num_positions: Rows in the table of relative positions. Memories farther away than that have no position.

    Attributes:
        rows: (P,) int64, the table's row for distance j + 1, if distances share rows (None: row j).
        random_drop: Whether training hides memories farther than l ~ U(0, L), one l per batch (section 4.2).
        max_block_size: Timesteps: blocks of any length up to this can be processed.
        max_distance: Memories farther away than this, in timesteps, are invisible and deleted (None: only the span
            decides).
        pool_interval: Timesteps: `pool` makes memories only in blocks with a timestep that is a multiple of this.
        endless: Whether some spans have no end.
        hidden_size, num_heads: Those of the only models that the mechanism is for (None: any).
    """

    random_drop = False
    max_block_size = 2**40
    max_distance: int | None = None
    pool_interval = 1
    endless = False
    hidden_size: int | None = None
    num_heads: int | None = None

    def __init__(self, max_span: int, ramp: float, num_positions: int):
        super().__init__()
        check_integers(1, max_span=max_span)
        check_integers(0, num_positions=num_positions)
        if defines(self, "pool") and defines(self, "log_gate"):
            raise ValueError(f"{type(self).__name__} has pool and log_gate, which do not go together")
        if not 0 < ramp < math.inf:
            raise ValueError(f"ramp must be a positive number of timesteps, got {ramp}; a hard edge is ramp=1")
        self.max_span, self.ramp, self.num_positions = max_span, ramp, num_positions
        self.rows: Tensor | None
        self.register_buffer("rows", None, persistent=False)

    def extra_repr(self) -> str:
        """Return the arguments of the constructor, as far as there are attributes of their names, for `print`."""
        names = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @property
    def max_reach(self) -> int:
        """The largest distance, in timesteps, at which a query can see a memory of this layer."""
        faded = math.ceil(self.max_span + self.ramp) - 1
        return faded if self.max_distance is None else min(faded, self.max_distance)

    @property
    def max_memories(self) -> int:
        """The largest number of memories that a layer can hold of each stream."""
        return self.max_reach

    def finite(self, span: Tensor) -> Tensor:
        """Return spans as averages and pictures count them: those without an end as L."""
        return span.clamp(max=self.max_span) if self.endless else span

    def check_block_size(self, block_size: int) -> None:
        """Raise ValueError for blocks of a length that the mechanism cannot process."""

    def pool(self, memory: Memory, time: Tensor) -> Memory | None:
        """Make additional memories out of existing ones, such as means of several.

        Args:
            memory: N rows, from earlier blocks.
            time: (T,), the timesteps of the block that is about to be processed.

        Returns:
            The additional memories, visible to this block and later ones; None if there are none.
        """
        return None

    def span(self, memory: Memory) -> Tensor:
        """Return the span of each memory for each head, in timesteps.

        A span must not depend on the current timestep, because a deleted memory cannot come back.

        Args:
            memory: N rows; in a pre-norm model their hidden states are normalized.

        Returns:
            (N or 1, H or 1)
        """
        raise NotImplementedError

    def log_gate(self, memory: Memory) -> Tensor | None:
        """Return what is added to the scores of all earlier memories when one is made, for each head (None: nothing).

        Args:
            memory: The rows of a block, as `span` gets them.

        Returns:
            (N, H), at most 0. The layer sums it up for each memory in `Memory.log_decay`.
        """
        return None

    def score_bias(self, age: Tensor) -> Tensor | None:
        """Return what is added to the scores of each memory, given its age, for each head (None: nothing).

        What is the same for all memories that a query sees has no effect.

        Args:
            age: (N,), timesteps from each memory to the block's first query.

        Returns:
            Broadcastable to (N, H).
        """
        return None

    def keep(self, memory: Memory, age: Tensor, alive: Tensor, mass: Mass) -> Tensor:
        """Return which memories to keep, of those that the next block could see.

        Args:
            memory: N rows, with keys, values and spans, and the log_decay until the next block.
            age: (N,), timesteps from each memory to the next block's first query.
            alive: (N,) bool, what the spans and episodes leave.
            mass: A function that returns the attention weights that each memory got from some of the block's queries,
                summed over these: (N, H). It takes them as a slice, such as slice(-1, None) for the last one.

        Returns:
            (N,) bool: true only where `alive` is.
        """
        return alive

    def loss(self, span: Tensor, nearest: Tensor, farthest: Tensor, batch_size: int, block_size: int) -> Tensor:
        """Return the span loss of one block, a scalar that includes its weight alpha.

        Args:
            span: (N, H or 1), timesteps.
            nearest: (N,), the smallest distance at which a query of the block can see each memory.
            farthest: (N,), the largest such distance; farthest < nearest if no query can.
            batch_size: B, the number of samples.
            block_size: T, the number of queries per sample.
        """
        return span.new_zeros(())


def defines(mechanism: Mechanism, method: str) -> bool:
    """Return whether a mechanism has its own version of an optional method."""
    return getattr(type(mechanism), method) is not getattr(Mechanism, method)


def visible_distances(
    age: Tensor, min_distance: Tensor, sample: Tensor, block_size: int, reach: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the range of distances at which the block's queries can see each memory, apart from its span.

    Args:
        age: (N,), timesteps from each memory to the block's first query.
        min_distance: (N,), the smallest distance at which each memory is visible.
        sample: (N,), the sample that each memory belongs to.
        block_size: T, timesteps.
        reach: (B, T), the largest distance that each query sees (None: any). It must grow by at most 1 per timestep, so
            that what is out of reach stays so.

    Returns:
        nearest and farthest, (N,) each: the smallest and the largest distance; farthest < nearest if no query sees it.
    """
    last_query = torch.full_like(age, block_size - 1)  # (N,): the last query that sees each memory
    if reach is not None:
        # One search for all samples: a multiple of the stride keeps the times of different samples apart.
        stride = 2**41
        queries = torch.arange(block_size, device=age.device)
        earliest = (queries - reach).clamp(min=1 - stride // 2)  # (B, T): time since the block's start that is in reach
        shift = torch.arange(len(reach), device=age.device)[:, None] * stride
        index = torch.searchsorted((earliest + shift).flatten(), sample * stride - age, right=True)  # (N,)
        last_query = index - 1 - sample * block_size
    return torch.maximum(age, min_distance), age + last_query
