"""The cost of one block of a training step, from its sizes alone: operations, and bytes by part.

It is for the fused attention, without torch.compile. B streams are processed at a time (a micro-batch), in blocks of T
timesteps; a layer holds M memories of each stream, and attends to the rows of these and of the block, of width d each.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from ..transformer import TransformerConfig

ROW_BYTES = 16  # of a memory beside its hidden state: the timestep and the smallest distance, int64 each
MAX_REL_BYTES = 2**29  # of the position scores of Triton's attention at a time, and as much for their gradient
LAUNCH_SECONDS = 5e-4  # of a layer's kernels, forward; twice as much backward; our assumption


@dataclass(frozen=True)
class StepCost:
    """One block of a micro-batch.

    Attributes:
        transformer: Sizes and options.
        num_layers, batch_size, block_size: batch_size is that of the micro-batch.
        num_memories: M, per stream and layer, on average.
        num_positions: Rows in the table of relative positions.
        num_pooled: Memories per stream that a block adds by pooling, before it drops others.
        span_width: Spans of a memory: 1, or H where heads have their own.
        precision: bfloat16 (autocast), float32 or float64.
        device_type: cuda or cpu.
    """

    transformer: TransformerConfig
    num_layers: int
    batch_size: int
    block_size: int
    num_memories: float
    num_positions: int
    num_pooled: float = 0
    span_width: int = 1
    precision: str = "float32"
    device_type: str = "cpu"

    @property
    def tokens(self) -> int:
        """B T."""
        return self.batch_size * self.block_size

    @property
    def memories(self) -> float:
        """Rows that a layer attends to beside the block's own, pooled ones included."""
        return self.batch_size * (self.num_memories + self.num_pooled)

    @property
    def number(self) -> int:
        """Bytes of a weight, a hidden state's element or a probability."""
        return 8 if self.precision == "float64" else 4

    @property
    def product(self) -> int:
        """Bytes of an element that a matrix product takes and gives."""
        return 2 if self.precision == "bfloat16" else self.number

    @property
    def classes(self) -> float:
        """Logits computed for a token, on average. With an adaptive softmax, words are assumed to follow Zipf's law."""
        sizes = self.transformer
        if sizes.cutoffs is None:
            return sizes.vocab_size if sizes.num_classes is None else sizes.num_classes
        bounds = [*sizes.cutoffs, sizes.vocab_size]
        shares = [math.log(high / low) / math.log(sizes.vocab_size) for low, high in pairwise(bounds)]
        tails = sum(share * (high - low) for share, (low, high) in zip(shares, pairwise(bounds), strict=True))
        return bounds[0] + len(sizes.cutoffs) + tails

    def operations(self, backward: bool = True) -> dict[str, float]:
        """By part. A product of (n, a) and (a, b) is 2 n a b operations, and as many for each gradient."""
        sizes, tokens, memories = self.transformer, self.tokens, self.memories
        d, num_seen = sizes.hidden_size, self.num_memories + self.num_pooled + self.block_size
        passes = 3 if backward else 1
        memory_passes = passes - (backward and not sizes.pre_norm)  # old hidden states themselves have no gradient
        with_position = tokens * min(self.num_positions, num_seen)
        layer = {
            "query, output": passes * 2 * tokens * 2 * d**2,
            "keys, values": (memory_passes * memories + passes * tokens) * 2 * 2 * d**2,
            "attention": passes * 2 * 2 * self.block_size * (memories + tokens) * d,
            "positions": passes * 2 * with_position * d,
            "feed-forward": passes * 2 * tokens * 2 * d * sizes.feedforward_size,
        }
        total = {name: self.num_layers * operations for name, operations in layer.items()}
        total["softmax"] = passes * 2 * tokens * d * self.classes
        return total

    def bytes_moved(self) -> float:
        """A lower bound: weights, hidden states, keys and values of all memories, once forward and twice backward."""
        sizes = self.transformer
        d = sizes.hidden_size
        weights = self.num_layers * (4 * d**2 + 2 * d * sizes.feedforward_size) + 2 * d * sizes.vocab_size
        rows = self.num_layers * (self.memories + self.tokens) * d * 3
        return 3 * self.product * (weights + rows)

    def roofline_seconds(self, flops: float, bandwidth: float) -> float:
        """A lower bound: the longer of the times for computing and for moving bytes."""
        return max(sum(self.operations().values()) / flops, self.bytes_moved() / bandwidth)

    def seconds(self, flops: float, bandwidth: float, backward: bool = True) -> float:
        """An estimate: products, then what other kernels move; or launching them all, if that takes longer.

        What is saved for the backward pass is written and read, in the backward pass read again, and its gradient
        written and read. All memories are copied twice: beside the block, and when some are dropped.
        """
        operations = sum(self.operations(backward).values())
        layer = self.saved_in_attention() + self.saved_in_feedforward()
        moved = self.num_layers * ((5 if backward else 2) * layer + (7 if backward else 2) * self.position_scores())
        moved += 4 * self.memory_bytes()
        if backward and self.transformer.activation_checkpointing:
            operations += sum(self.operations(backward=False).values())
            moved += 2 * self.num_layers * layer
        launches = self.num_layers * LAUNCH_SECONDS * (3 if backward else 1)
        return max(operations / flops + moved / bandwidth, launches)

    def memory_bytes(self) -> float:
        """Bytes of the memories that the micro-batch holds, in all layers."""
        row = self.transformer.hidden_size * self.number + ROW_BYTES
        return self.num_layers * self.batch_size * self.num_memories * row

    def position_scores(self) -> float:
        """Bytes of the scores of all queries with the position table, which a layer of Triton's attention stores."""
        if self.device_type != "cuda":
            return 0
        seen = min(self.num_positions, self.num_memories + self.num_pooled + self.block_size)
        return self.tokens * self.transformer.num_heads * seen * self.product

    def saved_in_attention(self) -> float:
        """Bytes that the attention of one layer saves for the backward pass, without the memories themselves."""
        sizes, d = self.transformer, self.transformer.hidden_size
        rows = self.memories + self.tokens
        cast = self.product if self.product < self.number else 0  # of a product's input, to bfloat16
        block = self.number + (self.number if sizes.pre_norm else 0)  # the layer's input; normalized, as keys see it
        block += cast or (self.number if sizes.pre_norm else 0)  # the input of the query
        block += 2 * self.product  # query and output
        block += 0 if sizes.pre_norm else self.number  # the sum that is normalized
        saved = self.tokens * d * block + 2 * rows * d * self.product  # keys and values
        if sizes.pre_norm:
            saved += self.memories * d * self.number  # normalized
        saved += self.batch_size * self.num_pooled * d * self.number
        saved += rows * (ROW_BYTES + (self.span_width + 2) * self.number)  # age, smallest distance, span and its loss
        saved += self.tokens * sizes.num_heads * self.number  # the log-sum-exp of each query
        return saved + (rows + self.tokens if sizes.pre_norm else self.tokens) * 2 * self.number  # statistics of norms

    def saved_in_feedforward(self) -> float:
        """Bytes that the feed-forward part of one layer saves for the backward pass."""
        sizes = self.transformer
        inner = self.product  # after the ReLU
        if sizes.dropout:
            inner += self.product + (1 if self.device_type == "cuda" else self.product)  # after dropout, and its mask
        return self.tokens * (
            sizes.hidden_size * (self.number + self.product) + sizes.feedforward_size * inner + 2 * self.number
        )

    def saved_around_layers(self) -> float:
        """Bytes that the embedding and the input of the softmax save for the backward pass."""
        sizes, mask = self.transformer, 1 if self.device_type == "cuda" else self.number
        elements = self.product + (self.number if sizes.pre_norm else 0)  # the input of the softmax, of the norm
        elements += 2 * mask if sizes.embedding_dropout else 0
        return self.tokens * (sizes.hidden_size * elements + 8)

    def saved_bytes(self) -> float:
        """Bytes saved for the backward pass, beside weights and memories."""
        layer = self.saved_in_attention() + self.saved_in_feedforward()
        if self.transformer.activation_checkpointing:
            layer = self.tokens * self.transformer.hidden_size * self.number
        return self.num_layers * layer + self.saved_around_layers()

    def moments(self) -> list[dict[str, float]]:
        """Bytes by part, beside weights, gradients, optimizer and old memories, at each moment that may be the peak."""
        sizes, d = self.transformer, self.transformer.hidden_size
        rows, logits = self.memories + self.tokens, self.tokens * self.classes * self.number
        saved, kept = self.saved_bytes(), self.memory_bytes()
        attended = self.num_layers * rows * (d * self.number + 2 * ROW_BYTES)
        layer_saved = self.saved_in_attention() + self.saved_in_feedforward()
        recomputed = layer_saved + rows * d * self.number if sizes.activation_checkpointing else 0

        grads = 2 * rows * d * self.product + 3 * self.tokens * d * self.product  # of keys, values; query, output
        grads += rows * sizes.num_heads * self.number  # of spans
        if sizes.pre_norm:
            grads += 3 * self.memories * d * self.product  # of the normalized memories
        if self.product < self.number:
            grads += rows * d * self.product  # the memories, cast
        grads += 2 * min(MAX_REL_BYTES, self.position_scores())
        feedforward_grads = self.tokens * (2 * sizes.feedforward_size * self.product + 2 * d * self.number)
        done = 0 if sizes.activation_checkpointing else self.saved_in_feedforward()
        flight, backward = "memories in flight", "workspace of the backward pass"
        return [
            {flight: attended + kept, "saved for the backward pass": saved, "logits": logits},
            {flight: kept, "saved for the backward pass": saved, "logits": 3 * logits},
            {flight: kept, "saved for the backward pass": saved, backward: recomputed + feedforward_grads},
            {flight: kept, "saved for the backward pass": saved - done, backward: recomputed + grads},
        ]
