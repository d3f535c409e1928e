"""The model: a decoder-only Transformer whose layers have memories (section 3). Models differ in mechanism only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu
from torch.utils.checkpoint import checkpoint

from .attention import soft_mask
from .checks import check_integers, check_tokens
from .kernels.dispatch import BACKENDS
from .kernels.packed_layout import NEVER, sample_index
from .memory.mechanism import Mechanism, defines, visible_distances
from .memory.metrics import accurate_sum, aggregate_metrics, memory_size
from .memory.packed import Memory, concatenate_parts, counts_and_max_ages, empty, from_dense, keep_rows, with_max_age
from .memory_attention import MemoryAttention
from .output_heads import AdaptiveSoftmax, LinearHead, without_autocast

POSITION_MULTIPLE = 64  # rows of the position table

State = dict[str, Any]  # "step": the next timestep; "layers": the Memory of each; "weights_fingerprint": of its cache


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options of a Transformer. Its depth is the number of mechanisms that it is given.

    Args:
        vocab_size: Number of input tokens.
        hidden_size: d.
        num_heads: H, must divide d.
        feedforward_size: Width of the feed-forward layers.
        num_classes: Number of outputs (None: vocab_size).
        cutoffs: Token ids at which the embeddings of an adaptive softmax and input get smaller (None: all alike).
        dropout: Of the attention weights and after the ReLU.
        embedding_dropout: Of the embeddings and of the last layer's output.
        embedding_std: Initial standard deviation of the embeddings (None: hidden_size ** -0.5); not with cutoffs.
        pre_norm: Normalize the input of each sublayer, instead of its output after the residual.
        attention_backend: The backend of `packed_span_attention`.
        activation_checkpointing: Save only the input of each layer for the backward pass, and recompute the rest.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    feedforward_size: int
    num_classes: int | None = None
    cutoffs: Sequence[int] | None = None
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    embedding_std: float | None = None
    pre_norm: bool = False
    attention_backend: str = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_integers(1, vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_heads=self.num_heads)
        check_integers(1, feedforward_size=self.feedforward_size)
        if self.num_classes is not None:
            check_integers(1, num_classes=self.num_classes)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size={self.hidden_size}, got {self.num_heads}")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.attention_backend not in BACKENDS:
            backends = ", ".join(BACKENDS)
            raise ValueError(f"attention_backend must be one of {backends}, got {self.attention_backend}")
        if self.embedding_std is not None and not self.embedding_std > 0:
            raise ValueError(f"embedding_std must be positive or null, got {self.embedding_std}")


class TransformerBlock(nn.Module):
    """Attention to the memories and the block, then feed-forward; the hidden states that enter become memories.

    Args:
        mechanism: How this layer treats its memories.
        config: Sizes and options.
    """

    def __init__(self, mechanism: Mechanism, config: TransformerConfig):
        super().__init__()
        size = config.hidden_size
        self.mechanism, self.dropout, self.pre_norm = mechanism, config.dropout, config.pre_norm
        self.attention = MemoryAttention(size, config.num_heads, config.dropout, config.attention_backend)
        self.up_proj = nn.Linear(size, config.feedforward_size)
        self.down_proj = nn.Linear(config.feedforward_size, size)
        self.attention_norm = nn.LayerNorm(size)
        self.feedforward_norm = nn.LayerNorm(size)
        self.eviction: Mechanism | None = None  # whose `keep` applies as well

    def forward(
        self,
        hidden: Tensor,
        memory: Memory,
        step: Tensor,
        position: Tensor,
        reach: Tensor | None,
        episode_reach: Tensor | None,
        span_cap: int | None = None,
    ) -> tuple[Tensor, Memory, Tensor, dict[str, Tensor]]:
        """Process one block.

        Args:
            hidden: (B, T, d).
            memory: The memories of this layer, from earlier blocks.
            step: Scalar, the timestep of the block's first query.
            position: (n, D), the table of relative positions.
            reach: (B, T), timesteps up to which each query sees (None: all).
            episode_reach: (B, T), the same without random drop: memories beyond it are deleted (None: none are).
            span_cap: Timesteps: longer spans count as this (None: no limit).

        Returns:
            The output (B, T, d), everything that the block attended to (N rows), which of these rows to keep (N,), and
            the layer's metrics.
        """
        batch_size, block_size, _ = hidden.shape
        time = step + torch.arange(block_size, device=hidden.device)  # (T,)
        pooled = self.mechanism.pool(memory, time)
        block = from_dense(hidden, time)
        memory, block, log_decay = self.decayed(memory, block, block_size)
        attended = self.attended(*([memory, block] if pooled is None else [memory, pooled, block]))  # N rows
        age = step - attended.time  # (N,)
        assert attended.kv is not None
        key, value, span = attended.kv  # (N, H, D), (N, H, D), (N, H or 1)
        if span_cap is not None:
            span = span.clamp(max=span_cap)  # those in `attended` stay as the mechanism gave them
        max_distance = self.mechanism.max_distance
        if max_distance is not None:
            farthest_seen = torch.full((batch_size, block_size), max_distance, device=hidden.device)  # (B, T)
            reach = farthest_seen if reach is None else torch.minimum(reach, farthest_seen)

        attention_input = self.attention_norm(hidden) if self.pre_norm else hidden
        seen = attended._replace(kv=(key, value, span))
        options: dict[str, Any] = {
            "age": age,
            "ramp": self.mechanism.ramp,
            "position": position[: self.num_positions(memory, pooled, block_size)],
            "rows": self.mechanism.rows,
            "reach": reach,
            "bias": self.score_bias(attended, age),
        }
        attention_output = self.attention(attention_input, seen, **options)  # (B, T, d)
        if self.pre_norm:
            hidden = hidden + attention_output
            hidden = hidden + self.feedforward(self.feedforward_norm(hidden))
        else:
            hidden = self.attention_norm(hidden + attention_output)
            hidden = self.feedforward_norm(hidden + self.feedforward(hidden))

        sample = sample_index(attended.offsets, len(age))  # (N,)
        nearest, farthest = visible_distances(age, attended.min_distance, sample, block_size, reach)  # (N,) each
        metrics = {"span_loss": self.mechanism.loss(span, nearest, farthest, batch_size, block_size)}
        with torch.no_grad():
            if log_decay is not None and attended.log_decay is not None:
                attended = attended._replace(log_decay=attended.log_decay + log_decay.index_select(0, sample))
            m = soft_mask((age + block_size)[:, None], span, self.mechanism.ramp)  # (N, H or 1), for the next block
            keep = (m > 0).any(-1) & (attended.min_distance < NEVER)  # (N,)
            if max_distance is not None:
                keep = keep & (age + block_size <= max_distance)
            if episode_reach is not None:
                keep = keep & (age + block_size - 1 <= episode_reach[:, -1][sample])
            mass = partial(self.attention.mass, attention_input, seen, **options)
            for mechanism in filter(None, (self.mechanism, self.eviction)):
                keep = mechanism.keep(attended, age + block_size, keep, mass)
            num_queries = batch_size * block_size
            is_new = (attended.time >= step)[:, None]  # (N, 1)
            metrics["memory_size"] = memory_size(span, self.mechanism.ramp, nearest, farthest, num_queries)
            metrics["span"] = accurate_sum(self.mechanism.finite(span) * is_new).mean() / num_queries
        return hidden, attended, keep, metrics

    def decayed(self, memory: Memory, block: Memory, block_size: int) -> tuple[Memory, Memory, Tensor | None]:
        """Sum the block's log gates, if the mechanism has any.

        Returns:
            The memory and the block with a `log_decay`, as of the block's start: the gates since then weigh alike on
            all that a query sees, which cancels in the softmax. And the sum of the log gates of the block, (B, H).
        """
        if not defines(self.mechanism, "log_gate"):
            return memory, block, None
        log_gate = cast(Tensor, self.mechanism.log_gate(self.normalized(block)))  # (B T, H)
        sums = log_gate.unflatten(0, (-1, block_size)).cumsum(1)  # (B, T, H)
        if memory.log_decay is None:
            memory = memory._replace(log_decay=sums.new_zeros(len(memory.time), sums.shape[2]))
        return memory, block._replace(log_decay=-sums.flatten(0, 1)), sums[:, -1].detach()

    def score_bias(self, memory: Memory, age: Tensor) -> Tensor | None:
        """Return what is added to the scores of each memory, broadcastable to (N, H); None: nothing."""
        bias = self.mechanism.score_bias(age)
        if memory.log_decay is None:
            return bias
        return memory.log_decay if bias is None else memory.log_decay + bias

    def num_positions(self, memory: Memory, pooled: Memory | None, block_size: int) -> int:
        """Return how many rows of the position table a block needs: none beyond the largest distance to a memory.

        Rounded up, so that products keep aligned sizes, and few different ones.
        """
        if memory.max_age is None or pooled is not None or self.mechanism.rows is not None:
            return self.mechanism.num_positions
        largest_distance = memory.max_age + block_size - 1
        rounded = -(-largest_distance // POSITION_MULTIPLE) * POSITION_MULTIPLE
        return min(rounded, self.mechanism.num_positions)

    def attended(self, *memories: Memory) -> Memory:
        """Concatenate the memories and the block as parts, with keys, values and spans.

        Training projects all of them in one matmul; evaluation reuses the cached projections.
        """
        if not torch.is_grad_enabled():
            return concatenate_parts(*(self.with_kv(memory) for memory in memories))
        normalized = [self.normalized(memory) for memory in memories]
        hidden_parts = [memory.hidden for memory in normalized]
        parts = concatenate_parts(*(memory._replace(hidden=memory.hidden.detach()) for memory in memories))
        hidden = torch.cat(hidden_parts).detach() if self.pre_norm else parts.hidden
        key, value = self.attention.keys_and_values_of_parts(hidden, hidden_parts)
        return parts._replace(kv=(key, value, torch.cat([self.spans(memory) for memory in normalized])))

    def with_kv(self, memory: Memory) -> Memory:
        """Return the memory with its keys, values and spans, which are computed unless they are cached."""
        if memory.kv is not None:
            return memory
        normalized = self.normalized(memory)
        key, value = self.attention.keys_and_values(normalized.hidden)
        return memory._replace(kv=(key, value, self.spans(normalized)))

    def normalized(self, memory: Memory) -> Memory:
        """Return the memory as projections and spans see it: normalized in a pre-norm model."""
        return memory._replace(hidden=self.attention_norm(memory.hidden)) if self.pre_norm else memory

    def spans(self, normalized: Memory) -> Tensor:
        """Return the spans of a normalized memory, (N, H or 1), in timesteps."""
        return self.mechanism.span(normalized).expand(len(normalized.time), -1)

    def feedforward(self, hidden: Tensor) -> Tensor:
        inner = relu(self.up_proj(hidden), inplace=True)  # (B, T, feedforward_size)
        return self.down_proj(dropout(inner, self.dropout, self.training))


class Transformer(nn.Module):
    """Tokens in, logits out, with memories carried from block to block.

    Args:
        config: Sizes and options.
        mechanisms: One per layer, such as [ExpireSpan(...) for _ in range(num_layers)].
    """

    def __init__(self, config: TransformerConfig, mechanisms: Sequence[Mechanism]):
        super().__init__()
        if isinstance(mechanisms, Mechanism) or not mechanisms:
            raise ValueError("mechanisms must be one per layer, as in [ExpireSpan(...) for _ in range(4)]")
        for layer, mechanism in enumerate(mechanisms):
            for name in ("hidden_size", "num_heads"):
                value, expected = getattr(mechanism, name), getattr(config, name)
                if value not in (None, expected):
                    kind = type(mechanism).__name__
                    raise ValueError(f"{name} of layer {layer}'s {kind} must be the config's {expected}, got {value}")
        self.config = config
        size = config.hidden_size
        if config.cutoffs is None:
            self.embedding = nn.Embedding(config.vocab_size, size)
        num_positions = max(mechanism.num_positions for mechanism in mechanisms)
        self.position = nn.Parameter(torch.empty(num_positions, size // config.num_heads))  # (n, D), for all layers
        self.layers = nn.ModuleList(TransformerBlock(mechanism, config) for mechanism in mechanisms)
        self.norm = nn.LayerNorm(size) if config.pre_norm else nn.Identity()
        self.output_head: LinearHead | AdaptiveSoftmax
        if config.cutoffs is None:
            self.output_head = LinearHead(size, config.vocab_size if config.num_classes is None else config.num_classes)
            std = size**-0.5 if config.embedding_std is None else config.embedding_std
            nn.init.normal_(self.embedding.weight, std=std)
        else:
            self.output_head = AdaptiveSoftmax(size, config.vocab_size, config.cutoffs)
        self.max_random_span = max(mechanism.max_span if mechanism.random_drop else 0 for mechanism in mechanisms)
        nn.init.normal_(self.position)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """The memory mechanism of each layer."""
        return [cast(TransformerBlock, layer).mechanism for layer in self.layers]

    def max_reach(self, span_cap: int | None = None) -> int:
        """Return the largest distance, in timesteps, at which a query of some layer can see a memory."""
        caps = [math.inf if span_cap is None else math.ceil(span_cap + each.ramp) - 1 for each in self.mechanisms]
        return int(max(min(each.max_reach, cap) for each, cap in zip(self.mechanisms, caps, strict=True)))

    def initial_state(self, batch_size: int) -> State:
        """Return the state at timestep 0, in which all memories are empty."""
        step = torch.zeros((), dtype=torch.long, device=self.position.device)
        memories = [empty(batch_size, self.config.hidden_size, like=self.position) for _ in self.layers]
        return {"step": step, "layers": memories}

    def sample_drop_limit(self, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw l ~ U(0, L) of random drop (section 4.2), (1, 1); None if no layer drops at random."""
        if not self.max_random_span:
            return None
        return torch.randint(self.max_random_span + 1, (1, 1), generator=generator)

    def forward(
        self,
        tokens: Tensor,
        state: State,
        reach: Tensor | None = None,
        span_cap: int | None = None,
        drop_limit: Tensor | None = None,
    ) -> tuple[Tensor, State, dict[str, Any]]:
        """Process one block.

        Args:
            tokens: (B, T), (B, T, F) or (B, T, vocab_size), see `embed`.
            state: From `initial_state` or from the previous block.
            reach: (B, T), timesteps since the episode began: what is older is neither seen nor kept (None: one endless
                episode).
            span_cap: Timesteps: longer spans are shortened to this, in evaluation (None: no limit). Shorter ones stay
                as they are, where another max_span would rescale them.
            drop_limit: (1, 1), the l of random drop in training, from `sample_drop_limit`, for all parts of a batch
                (None: drawn here).

        Returns:
            The logits (B, T, num_classes), or with an adaptive softmax the hidden states (B, T, d), for `output_head`;
            the detached state for the next block; and the metrics of `aggregate_metrics`.

        Raises:
            ValueError: If tokens, state and reach do not fit together, or an id is out of range (on a CPU).
        """
        memories = state["layers"]
        if len(memories) != len(self.layers):
            raise ValueError(f"state must be of a model of {len(self.layers)} layers, got {len(memories)}")
        check_tokens(tokens, memories[0].offsets.shape[-1] - 1, self.config.vocab_size)
        if reach is not None and reach.shape != tokens.shape[:2]:
            raise ValueError(f"reach must be (B, T) = {tuple(tokens.shape[:2])}, got {tuple(reach.shape)}")
        hidden = dropout(self.embed(tokens), self.config.embedding_dropout, self.training)  # (B, T, d)

        batch_size, block_size = hidden.shape[:2]
        episode_reach = reach
        if self.max_random_span and self.training:  # random drop, section 4.2
            limit = cast(Tensor, self.sample_drop_limit() if drop_limit is None else drop_limit)  # for all layers
            limit = limit.to(hidden.device, non_blocking=True)
            reach = limit.expand(batch_size, block_size) if reach is None else torch.minimum(reach, limit)

        fingerprint = self.weights_fingerprint() if self.uses_kv_cache else []
        if not self.uses_kv_cache or state.get("weights_fingerprint") != fingerprint:
            memories = [memory._replace(kv=None) for memory in memories]  # the cached keys belong to other weights
        memories = [with_max_age(memory, state["step"]) for memory in memories]
        attended, keep, layer_metrics = [], [], []
        for layer, memory in zip(self.layers, memories, strict=True):
            inputs = (hidden, memory, state["step"], self.position, reach, episode_reach, span_cap)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                hidden, layer_attended, layer_keep, metrics = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                hidden, layer_attended, layer_keep, metrics = layer(*inputs)
            attended.append(layer_attended if self.uses_kv_cache else layer_attended._replace(kv=None))
            keep.append(layer_keep)
            layer_metrics.append(metrics)
        next_step = state["step"] + block_size
        kept = counts_and_max_ages(attended, keep, next_step).tolist()  # the only time that the device is waited for
        memories = [
            keep_rows(memory, mask, count)._replace(max_age=max_age)
            for memory, mask, count, max_age in zip(attended, keep, *kept, strict=True)
        ]

        hidden = dropout(self.norm(hidden), self.config.embedding_dropout, self.training)
        next_state = {"step": next_step, "layers": memories, "weights_fingerprint": fingerprint}
        return self.output_head(hidden), next_state, aggregate_metrics(layer_metrics, memories)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed the input.

        Args:
            tokens: (B, T), or (B, T, F) for F fields per timestep, whose embeddings are summed, or multi-hot floats
                (B, T, vocab_size).

        Returns:
            (B, T, d)
        """
        if tokens.is_floating_point():
            with without_autocast(tokens):  # as for tokens, so that hidden states and memories are float32
                return tokens.to(self.embedding.weight.dtype) @ self.embedding.weight
        if isinstance(self.output_head, AdaptiveSoftmax):
            embedded = self.output_head.embed(tokens)
        else:
            embedded = self.embedding(tokens)
        return embedded if tokens.dim() == 2 else embedded.sum(2)

    @property
    def uses_kv_cache(self) -> bool:
        """Whether memories keep their keys, values and spans: in evaluation without gradients, uncompiled."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def weights_fingerprint(self) -> list[tuple[int, int]]:
        """Return a fingerprint that changes with the weights, except by writes to `.data` or a fused optimizer."""
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
