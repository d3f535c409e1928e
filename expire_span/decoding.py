"""Decode one timestep at a time, as acting and generating do, with memories that are written in place.

Outputs, states and metrics are those of `Transformer.forward` with blocks of one timestep.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from .attention import soft_mask, span_attention
from .kernels.dispatch import select_backend
from .kernels.packed_layout import NEVER
from .memory.cache import Cache
from .memory.mechanism import defines
from .memory.metrics import accurate_dtype
from .memory.packed import Memory
from .memory_attention import constant
from .transformer import State, Transformer, TransformerBlock


class Decoder:
    """A model's streams, timestep by timestep, without gradients.

        decoder = Decoder(model, model.initial_state(batch_size))
        logits = decoder(tokens)            # (B,) to (B, num_classes), for each timestep
        state = decoder.state()             # to go on with blocks

    Args:
        model: In evaluation mode. Its weights must not change while it decodes.
        state: From `initial_state`, a block or another decoder; it stays as it is.
        span_cap: Timesteps: longer spans are shortened to this (None: no limit).

    Raises:
        ValueError: If the model is in training mode.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, state: State, span_cap: int | None = None):
        if model.training:
            raise ValueError("a Decoder is for evaluation: call model.eval() first")
        self.model, self.next_step, self.fingerprint = model, int(state["step"]), model.weights_fingerprint()
        memories = state["layers"]
        if state.get("weights_fingerprint") != self.fingerprint:
            memories = [memory._replace(kv=None) for memory in memories]  # the cached keys belong to other weights
        layers = cast(Iterable[TransformerBlock], model.layers)
        self.layers = [LayerDecoder(layer, memory, span_cap) for layer, memory in zip(layers, memories, strict=True)]
        self.timesteps = 0  # since the last call of `pop_metrics`

    @torch.no_grad()
    def __call__(self, tokens: Tensor, reach: Tensor | None = None) -> Tensor:
        """Process one timestep.

        Args:
            tokens: (B,), (B, F) or multi-hot floats (B, vocab_size), see `Transformer.embed`.
            reach: (B,), timesteps since the episode began (None: one endless episode).

        Returns:
            The logits (B, num_classes), or with an adaptive softmax the hidden states (B, d).
        """
        hidden = self.model.embed(tokens[:, None])[:, 0]  # (B, d)
        for layer in self.layers:
            hidden = layer(hidden, self.next_step, self.model.position, reach)
        self.next_step += 1
        self.timesteps += 1
        return self.model.output_head(self.model.norm(hidden))

    @torch.no_grad()
    def state(self) -> State:
        """Return a copy of the state after the last timestep."""
        step = torch.tensor(self.next_step, device=self.model.position.device)
        memories = [layer.cache.packed() for layer in self.layers]
        return {"step": step, "layers": memories, "weights_fingerprint": self.fingerprint}

    def pop_metrics(self) -> dict[str, float]:
        """Return the means over the timesteps since the last call of what `aggregate_metrics` tells of memories."""
        num_queries = self.timesteps * self.layers[0].cache.num_streams
        sums = torch.stack([layer.counts.sum(0) for layer in self.layers]).T.tolist()  # (3, layers)
        size, held, span = ([value / num_queries for value in values] for values in sums)
        bytes_of_memories = sum(layer.bytes_of_memory * count for layer, count in zip(self.layers, held, strict=True))
        self.timesteps = 0
        for layer in self.layers:
            layer.counts.zero_()
        return {
            "memory/size": sum(size) / len(size),
            "memory/span": sum(span) / len(span),
            "memory/held": sum(held) / len(held),
            "memory/bytes": bytes_of_memories + 8 * len(self.layers),  # 8: the end of a stream's rows
            **{f"memory/size_layer_{index}": value for index, value in enumerate(size)},
            **{f"memory/held_layer_{index}": value for index, value in enumerate(held)},
        }


class LayerDecoder:
    """One layer and its cache.

    Attributes:
        counts: (B, 3), sums over timesteps: memories that were seen, the mean over heads; memories held after the
            timestep; the new memory's span, the mean over heads.
    """

    def __init__(self, layer: TransformerBlock, memory: Memory, span_cap: int | None):
        self.layer, self.mechanism = layer, layer.mechanism
        self.span_cap = math.inf if span_cap is None else float(span_cap)
        self.max_distance = NEVER if self.mechanism.max_distance is None else self.mechanism.max_distance
        projections = (layer.attention.query_proj, layer.attention.key_proj, layer.attention.value_proj)
        self.qkv_weight = torch.cat([projection.weight for projection in projections])  # (3 d, d)
        if defines(self.mechanism, "log_gate") and memory.log_decay is None:  # before the first block
            memory = memory._replace(log_decay=torch.zeros_like(cast(Tensor, self.mechanism.log_gate(memory))))
        self.cache = cache = Cache(layer.with_kv(memory))
        self.bytes_of_memory = sum(
            rows.element_size() * rows[0, 0].numel()
            for rows in (
                cache.hidden,
                cache.time,
                cache.min_distance,
                *([] if cache.log_decay is None else [cache.log_decay]),
            )
        )
        self.offsets = torch.arange(cache.num_streams + 1, device=cache.time.device)  # of one new row a stream
        self.new_distance = cache.min_distance.new_ones(cache.num_streams)
        self.counts = cache.hidden.new_zeros(cache.num_streams, 3, dtype=accurate_dtype(cache.hidden))
        has_one_dtype = cache.hidden.dtype == cache.key_value.dtype  # not under autocast
        backend = select_backend(layer.attention.backend, cache.hidden.device.type, cache.hidden.dtype)
        mechanisms = (self.mechanism, layer.eviction)
        self.keep_hooks = [mechanism.keep for mechanism in mechanisms if mechanism and defines(mechanism, "keep")]
        has_gates_or_bias = defines(self.mechanism, "log_gate") or defines(self.mechanism, "score_bias")
        has_hooks = self.keep_hooks or has_gates_or_bias or self.mechanism.endless
        self.attend = self.attend_in_torch
        if backend == "cpp" and has_one_dtype and not has_hooks:  # of which the operator knows nothing
            self.attend = self.attend_in_cpp

    def __call__(self, hidden: Tensor, step: int, position: Tensor, reach: Tensor | None) -> Tensor:
        """Process one timestep: (B, d) to (B, d), as `TransformerBlock.forward` does."""
        layer = self.layer
        time = torch.full_like(self.new_distance, step)  # (B,)
        self.pool(step, time)
        normalized = layer.attention_norm(hidden) if layer.pre_norm else hidden
        query_key_value = linear(normalized, self.qkv_weight)  # (B, 3 d)
        new = Memory(normalized, time, self.new_distance, self.offsets)
        span = layer.spans(new).to(hidden.dtype)  # (B, h)
        log_gate = self.mechanism.log_gate(new)  # (B, H)
        self.cache.make_room()
        attended, counts = self.attend(hidden, query_key_value, span, step, position, reach, log_gate)
        self.counts += counts
        attention_output = layer.attention.output_proj(attended)
        if layer.pre_norm:
            hidden = hidden + attention_output
            return hidden + layer.feedforward(layer.feedforward_norm(hidden))
        hidden = layer.attention_norm(hidden + attention_output)
        return layer.feedforward_norm(hidden + layer.feedforward(hidden))

    def pool(self, step: int, time: Tensor) -> None:
        """Append the memory that the mechanism makes of earlier ones at this timestep, if any."""
        if not defines(self.mechanism, "pool") or step % self.mechanism.pool_interval:
            return
        pooled = self.mechanism.pool(self.cache.rows(), time[:1])
        if pooled is not None and (pooled.min_distance < NEVER).any():
            pooled = self.layer.with_kv(pooled)
            key, value, span = cast(tuple[Tensor, ...], pooled.kv)
            self.cache.append(pooled.hidden, torch.stack([key, value], 1), span, pooled.time, pooled.min_distance)

    def attend_in_cpp(
        self,
        hidden: Tensor,
        query_key_value: Tensor,
        span: Tensor,
        step: int,
        position: Tensor,
        reach: Tensor | None,
        log_gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same as `attend_in_torch`, in one operator; without gates."""
        cache, mechanism = self.cache, self.mechanism
        attended, counts = torch.ops.expire_span_cpp.decode(
            hidden, query_key_value, span, *cache.tensors(), cache.columns, step,
            mechanism.ramp, self.max_distance, self.span_cap, position, mechanism.num_positions, mechanism.rows, reach,
        )  # fmt: skip
        cache.columns += 1
        return attended, counts

    def attend_in_torch(
        self,
        hidden: Tensor,
        query_key_value: Tensor,
        span: Tensor,
        step: int,
        position: Tensor,
        reach: Tensor | None,
        log_gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Append the new memory, attend to all, and mark as dead those that no later timestep can see.

        Args:
            hidden: (B, d).
            query_key_value: (B, 3 d).
            span: (B, h), timesteps.
            step: The timestep.
            position: The model's table of relative positions.
            reach: (B,), or None.
            log_gate: (B, H), added to the log_decay of all earlier memories for the next timestep, or None.

        Returns:
            The heads' outputs, (B, d), and what this timestep adds to `counts`, (B, 3).
        """
        cache, mechanism = self.cache, self.mechanism
        query, key_value = query_key_value.unflatten(1, (3, *cache.key_value.shape[3:])).split([1, 2], 1)
        time = torch.full_like(self.new_distance, step)  # (B,)
        cache.append(hidden, key_value, span, time, self.new_distance, None if log_gate is None else -log_gate)
        key, value = cache.key_value.transpose(1, 3).unbind(2)  # (B, H, C, D) each
        position = position[: mechanism.num_positions]
        if mechanism.rows is not None:
            position = position[mechanism.rows]
        age, spans = step - cache.time, cache.span.clamp(max=self.span_cap)  # (B, C), (B, C, h)
        max_age = torch.full_like(self.new_distance, self.max_distance)  # (B,)
        if reach is not None:
            max_age = torch.minimum(max_age, reach)
        options: dict[str, Any] = {
            "age": age,
            "span": spans.transpose(1, 2),
            "ramp": mechanism.ramp,
            "position": position,
            "reach": max_age[:, None],
            "bias": self.score_bias(age),
            "min_distance": cache.min_distance,
        }
        attended = span_attention(query.transpose(1, 2), key, value, **options)  # (B, H, 1, D)
        in_range = (age >= cache.min_distance) & (age <= max_age[:, None])  # (B, C)
        seen = (soft_mask(age[..., None], spans, mechanism.ramp) > 0) & in_range[..., None]  # (B, C, h)
        keep = (soft_mask(age[..., None] + 1, spans, mechanism.ramp) > 0).any(-1)  # (B, C)
        keep = keep & (cache.min_distance < NEVER) & (age + 1 <= self.max_distance)
        if reach is not None:
            keep = keep & (age <= reach[:, None])
        if log_gate is not None and cache.log_decay is not None:
            cache.log_decay += log_gate[:, None]  # 0 for the new memory
        for keep_hook in self.keep_hooks:
            used = slice(cache.columns)
            mass = partial(self.mass, query.transpose(1, 2), key, value, options)
            kept = keep_hook(cache.rows(), (age + 1)[:, used].flatten(), keep[:, used].flatten(), mass)
            keep[:, used] = kept.view_as(keep[:, used])
        cache.min_distance.masked_fill_(~keep, NEVER)
        per_head = torch.stack(
            [seen.sum(1).to(span.dtype), mechanism.finite(span.clamp(max=self.span_cap))]
        )  # (2, B, h)
        num_seen, mean_span = per_head.to(self.counts.dtype).mean(-1)  # (B,) each
        return attended.flatten(1), torch.stack([num_seen, keep.sum(1).to(num_seen.dtype), mean_span], 1)

    def score_bias(self, age: Tensor) -> Tensor | None:
        """What is added to the scores of memories of age (B, C): broadcastable to (B, H, C); None: nothing."""
        bias, log_decay = self.mechanism.score_bias(age.flatten()), self.cache.log_decay
        if bias is not None:
            bias = bias.expand(age.numel(), -1).unflatten(0, age.shape)  # (B, C, H or 1)
            log_decay = bias if log_decay is None else log_decay + bias
        return None if log_decay is None else log_decay.transpose(1, 2)

    def mass(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], queries: slice) -> Tensor:
        """As `MemoryAttention.mass`, of the only query: (B columns, H)."""
        with torch.inference_mode(False), torch.enable_grad():
            value = torch.zeros_like(constant(value)).requires_grad_()
            inputs: dict[str, Any] = {
                name: constant(option) if isinstance(option, Tensor) else option for name, option in options.items()
            }
            output = span_attention(constant(query), constant(key), value, **inputs)[:, :, queries]
            (mass,) = torch.autograd.grad(output.sum(), value)
        return mass[:, :, : self.cache.columns, 0].transpose(1, 2).flatten(0, 1)
