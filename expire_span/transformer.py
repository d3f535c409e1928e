"""The one model: a decoder-only stack whose layers remember (section 3). Its memories decide which model it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, relu
from torch.utils.checkpoint import checkpoint

from .attention import NEVER, fade, packed_span_attention, samples_of
from .heads import AdaptiveSoftmax, Softmax
from .kernels.operator import KERNELS
from .memory.mechanism import Mechanism, memory_size, reached
from .memory.packed import Memory, beside, dense, empty, select

State = dict[str, Any]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a Transformer; its depth is the number of memories that it is given.

    vocabulary         different input tokens; classes: different outputs (None: the vocabulary)
    cutoffs            adaptive softmax and input: word numbers from which embeddings get smaller (None: all alike)
    dropout            share dropped of the attention weights and after the ReLU
    embedding_dropout  share dropped of the embeddings and of the last layer's output
    embedding_init     standard deviation of the embeddings at the start (None: hidden_size ** -0.5); not with cutoffs
    pre_norm           normalise what enters a sublayer; else what leaves it, after the residual
    kernel             of the attention, see `packed_span_attention`
    recompute          keep nothing of a layer for the backward pass but what enters it, and compute it again
    """

    vocabulary: int
    hidden_size: int
    heads: int
    feedforward_size: int
    classes: int | None = None
    cutoffs: Sequence[int] | None = None
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    embedding_init: float | None = None
    pre_norm: bool = False
    kernel: str = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden_size % self.heads:
            raise ValueError(
                f"transformer.heads must divide transformer.hidden_size, got {self.heads} heads for {self.hidden_size}"
            )
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"transformer.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.kernel not in KERNELS:
            raise ValueError(f"transformer.kernel must be one of {', '.join(KERNELS)}, got {self.kernel}")
        if self.embedding_init is not None and not self.embedding_init > 0:
            raise ValueError(f"transformer.embedding_init must be positive, got {self.embedding_init}; or null")


class Projection(torch.autograd.Function):
    """Keys and values (N, d) of hidden states (N, d): parts (n, d), one after another.

    Only the parts are kept for the backward pass, as they are there anyway; and only those that want a gradient get it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, key: Tensor, value: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(key, value, *parts)
        return linear(hidden, key), linear(hidden, value)

    @staticmethod
    def backward(ctx: Any, of_key: Tensor, of_value: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *parts = (each.to(of_key.dtype) for each in ctx.saved_tensors)
        sizes = [len(part) for part in parts]
        by_part = list(zip(of_key.split(sizes), of_value.split(sizes), parts, strict=True))
        weights = [sum(each[number].T @ each[2] for each in by_part) for number in (0, 1)]
        needed = zip(by_part, ctx.needs_input_grad[3:], strict=True)
        return None, *weights, *(k @ key + v @ value if wanted else None for (k, v, _), wanted in needed)


class MemoryAttention(nn.Module):
    """Multi-head attention to packed memories, with one table of relative positions for all heads."""

    def __init__(self, hidden_size: int, heads: int, dropout: float = 0.0, kernel: str = "auto"):
        super().__init__()
        self.heads, self.dropout, self.kernel = heads, dropout, kernel
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (N, H, D) of hidden states (N, d)."""
        return self.by_head(self.key(hidden)), self.by_head(self.value(hidden))

    def project_parts(self, hidden: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same, of parts that stand one after another in hidden."""
        key, value = Projection.apply(hidden, self.key.weight, self.value.weight, *parts)
        return self.by_head(key), self.by_head(value)

    def by_head(self, states: Tensor) -> Tensor:  # (..., d) -> (..., H, D)
        return states.unflatten(-1, (self.heads, -1))

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, offsets: Tensor, **fading: Any) -> Tensor:
        """hidden (B, T, d) looks at what `project` gave; the rest as for `packed_span_attention`. Returns (B, T, d)."""
        query = self.by_head(self.query(hidden)).transpose(1, 2)  # (B, H, T, D)
        rate = self.dropout if self.training else 0.0
        fading |= {"dropout": rate, "kernel": self.kernel}
        out = packed_span_attention(query, key, value, offsets, **fading)  # (B, H, T, D)
        return self.output(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention to the memories and the block, then feed-forward; afterwards the block joins the memories."""

    def __init__(self, memory: Mechanism, config: TransformerConfig):
        super().__init__()
        size = config.hidden_size
        self.memory, self.dropout, self.pre_norm = memory, config.dropout, config.pre_norm
        self.attention = MemoryAttention(size, config.heads, config.dropout, config.kernel)
        self.feedforward_in = nn.Linear(size, config.feedforward_size)
        self.feedforward_out = nn.Linear(config.feedforward_size, size)
        self.norm_attention = nn.LayerNorm(size)
        self.norm_feedforward = nn.LayerNorm(size)

    def feedforward(self, hidden: Tensor) -> Tensor:
        inner = relu(self.feedforward_in(hidden), inplace=True)  # (B, T, feedforward_size)
        return self.feedforward_out(dropout(inner, self.dropout, self.training))

    def seen(self, memory: Memory) -> Memory:
        """As attention sees it."""
        return memory._replace(hidden=self.norm_attention(memory.hidden)) if self.pre_norm else memory

    def spans(self, seen: Memory) -> Tensor:
        return self.memory.span(seen).expand(len(seen.time), -1)  # (N, H or 1)

    def projected(self, memory: Memory) -> Memory:
        """With the keys, values and spans of what it holds."""
        if memory.projected is not None:
            return memory
        seen = self.seen(memory)
        return memory._replace(projected=(*self.attention.project(seen.hidden), self.spans(seen)))

    def entries(self, *parts: Memory) -> Memory:
        """All that can be seen, with keys, values and spans: in training made of all at once, else when each enters."""
        if not torch.is_grad_enabled():
            return beside(*(self.projected(part) for part in parts))
        seen = [self.seen(part) for part in parts]
        states = [part.hidden for part in seen]
        entries = beside(*(part._replace(hidden=part.hidden.detach()) for part in parts))
        hidden = torch.cat(states).detach() if self.pre_norm else entries.hidden
        key, value = self.attention.project_parts(hidden, states)
        return entries._replace(projected=(key, value, torch.cat([self.spans(part) for part in seen])))

    def forward(
        self,
        hidden: Tensor,
        memory: Memory,
        now: Tensor,
        position: Tensor,
        reach: Tensor | None,
        episode: Tensor | None,
    ) -> tuple[Tensor, Memory, Tensor, dict[str, Tensor]]:
        """hidden (B, T, d), whose first timestep is `now`; reach (B, T): what is seen; episode (B, T): what is kept.

        Returns the layer's output (B, T, d), all that it could see (N rows), which of them are kept (N,), and figures.
        """
        samples, block, _ = hidden.shape
        time = now + torch.arange(block, device=hidden.device)  # (T,)
        pooled = self.memory.pool(memory, time)
        entries = self.entries(memory, *([] if pooled is None else [pooled]), dense(hidden, time))  # N rows
        assert entries.projected is not None
        key, value, span = entries.projected  # (N, H, D) twice, (N, H or 1)
        sample, age = samples_of(entries.offsets, len(entries.time)), now - entries.time  # (N,)

        attended = self.attention(
            self.norm_attention(hidden) if self.pre_norm else hidden,
            key,
            value,
            entries.offsets,
            age=age,
            span=span,
            ramp=self.memory.ramp,
            position=position[: self.memory.positions],
            rows=self.memory.rows,
            reach=reach,
            born=entries.born,
        )
        if self.pre_norm:
            hidden = hidden + attended
            hidden = hidden + self.feedforward(self.norm_feedforward(hidden))
        else:
            hidden = self.norm_attention(hidden + attended)
            hidden = self.norm_feedforward(hidden + self.feedforward(hidden))

        nearest, farthest = reached(age, entries.born, sample, block, reach)
        loss = self.memory.loss(span, nearest, farthest, samples, block)
        with torch.no_grad():
            kept = (fade((age + block)[:, None], span, self.memory.ramp) > 0).any(-1)  # (N,)
            kept = kept & (entries.born < NEVER)
            if episode is not None:
                kept = kept & (age + block - 1 <= episode[:, -1][sample])  # an earlier episode's never come back
            fresh = (entries.time >= now)[:, None]
            figures = {
                "size": memory_size(span, self.memory.ramp, nearest, farthest, samples * block),
                "span": (span * fresh).sum(0).mean() / (samples * block),
            }
        figures["loss"] = loss
        return hidden, entries, kept, figures


class Transformer(nn.Module):
    """Tokens in, scores out, and the memories carried from block to block.

    memory: one mechanism a layer, for example [ExpireSpan(...) for _ in range(layers)].
    """

    def __init__(self, config: TransformerConfig, memory: Sequence[Mechanism]):
        super().__init__()
        if not memory:
            raise ValueError("memory must be one mechanism a layer, as [ExpireSpan(...) for _ in range(4)]; got none")
        self.config = config
        size = config.hidden_size
        if config.cutoffs is None:
            self.embedding = nn.Embedding(config.vocabulary, size)
        self.position = nn.Parameter(torch.empty(max(each.positions for each in memory), size // config.heads))
        self.layers = nn.ModuleList(Layer(each, config) for each in memory)
        self.norm = nn.LayerNorm(size) if config.pre_norm else nn.Identity()
        self.output: Softmax | AdaptiveSoftmax
        if config.cutoffs is None:
            self.output = Softmax(size, config.vocabulary if config.classes is None else config.classes)
            std = size**-0.5 if config.embedding_init is None else config.embedding_init
            nn.init.normal_(self.embedding.weight, std=std)
        else:
            self.output = AdaptiveSoftmax(size, config.vocabulary, config.cutoffs)
        self.farthest_drop = max(each.max_span if each.random_drop else 0 for each in memory)  # L of the random drop
        nn.init.normal_(self.position)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """One a layer."""
        return [cast(Layer, layer).memory for layer in self.layers]

    def initial_state(self, samples: int) -> State:
        """No memories yet, at timestep 0."""
        now = torch.zeros((), dtype=torch.long, device=self.position.device)
        return {"now": now, "layers": [empty(samples, self.config.hidden_size, self.position) for _ in self.layers]}

    @property
    def remembers_projections(self) -> bool:
        """Whether each memory's keys, values and span are made once, when it enters: so while no weight changes."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

    def weights_version(self) -> list[tuple[int, int]]:
        """Others for other weights. A change in place by `.data` or a fused optimiser is not seen."""
        return [(each.data_ptr(), each._version) for each in self.parameters()] if self.remembers_projections else []

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T, d), of tokens (B, T), of F fields a timestep (B, T, F), or of floating bags (B, T, vocabulary)."""
        if tokens.is_floating_point():
            return tokens.to(self.embedding.weight.dtype) @ self.embedding.weight
        embedded = self.output.embed(tokens) if isinstance(self.output, AdaptiveSoftmax) else self.embedding(tokens)
        return embedded if tokens.dim() == 2 else embedded.sum(2)

    def forward(
        self, tokens: Tensor, state: State, reach: Tensor | None = None
    ) -> tuple[Tensor, State, dict[str, Any]]:
        """One block.

        tokens (B, T) or (B, T, F), or a bag of tokens (B, T, vocabulary), see `embed`; reach (B, T): timesteps since
        the episode began, before which nothing is seen or kept (None: one endless episode). Returns the scores
        (B, T, classes), or what an adaptive softmax wants in their place; the detached state for the next block; and
        figures: span_loss (alpha included, differentiable), memory/size, memory/span, memory/size_layer_N and
        memory/bytes.
        """
        hidden = dropout(self.embed(tokens), self.config.embedding_dropout, self.training)

        samples, block = hidden.shape[:2]
        episode = reach
        if self.farthest_drop and self.training:
            drawn = torch.randint(self.farthest_drop + 1, (1, 1))  # one for all samples and layers
            limit = drawn.to(hidden.device, non_blocking=True)
            reach = limit.expand(samples, block) if reach is None else torch.minimum(reach, limit)

        version, memories = self.weights_version(), state["layers"]
        if not self.remembers_projections or state.get("weights") != version:  # their keys and values are not true
            memories = [memory._replace(projected=None) for memory in memories]
        entries, kept, figures = [], [], []
        for layer, memory in zip(self.layers, memories, strict=True):
            given = (hidden, memory, state["now"], self.position, reach, episode)
            if self.config.recompute and torch.is_grad_enabled():
                hidden, seen, which, about = checkpoint(layer, *given, use_reentrant=False)
            else:
                hidden, seen, which, about = layer(*given)
            entries.append(seen if self.remembers_projections else seen._replace(projected=None))
            kept.append(which)
            figures.append(about)
        totals = torch.stack([which.sum() for which in kept]).tolist()  # a device is waited for here, and only here
        memories = [select(*each) for each in zip(entries, kept, totals, strict=True)]

        hidden = dropout(self.norm(hidden), self.config.embedding_dropout, self.training)
        carried = {"now": state["now"] + block, "layers": memories, "weights": version}
        return self.output(hidden), carried, summed_up(figures, memories)


def summed_up(figures: list[dict[str, Tensor]], memories: list[Memory]) -> dict[str, Any]:
    """The layers' figures as the model's: the loss summed, sizes and spans meaned, a stream's bytes but projections."""
    sizes = [each["size"] for each in figures]
    state_bytes = sum(tensor.numel() * tensor.element_size() for memory in memories for tensor in memory[:4])
    return {
        "span_loss": torch.stack([each["loss"] for each in figures]).sum(),
        "memory/size": torch.stack(sizes).mean(),
        "memory/span": torch.stack([each["span"] for each in figures]).mean(),
        "memory/bytes": state_bytes / (len(memories[0].offsets) - 1),
        **{f"memory/size_layer_{number}": size for number, size in enumerate(sizes)},
    }
