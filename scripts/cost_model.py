"""A lower bound of the cost of a training step: operations and bytes, from the sizes and the number of memories."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """flops: multiplications and additions per second of a large matrix product; bandwidth: bytes per second."""

    name: str
    flops: float
    bandwidth: float


H100 = Device("H100 (65 % of 989 TFLOP/s bf16, 85 % of 3.35 TB/s)", 0.65 * 989e12, 0.85 * 3.35e12)


@dataclass(frozen=True)
class TrainStepCost:
    """One block of all streams, forward and backward. num_memories: per stream and layer, on average."""

    num_layers: int
    hidden_size: int
    num_heads: int
    feedforward_size: int
    vocab_size: int
    batch_size: int
    block_size: int
    num_memories: float
    num_positions: int
    bytes_per_number: int = 4
    pre_norm: bool = False  # keys and values of memories then also need the gradient of their (normalized) inputs

    def operations(self) -> dict[str, float]:
        """By part. A product of (n, a) and (a, b) is 2 n a b operations, and as many for each gradient."""
        tokens, memories = self.batch_size * self.block_size, self.batch_size * self.num_memories
        pairs = self.block_size * (memories + tokens)  # of queries and keys; all heads together are d wide
        with_position = self.block_size * self.batch_size * min(self.num_positions, self.num_memories + self.block_size)
        layer = {
            "query, output": 3 * 2 * tokens * 2 * self.hidden_size**2,
            "keys, values": ((3 if self.pre_norm else 2) * memories + 3 * tokens) * 2 * 2 * self.hidden_size**2,
            "attention": 3 * 2 * 2 * pairs * self.hidden_size,
            "positions": 3 * 2 * with_position * self.hidden_size,
            "feed-forward": 3 * 2 * tokens * 2 * self.hidden_size * self.feedforward_size,
        }
        total = {name: self.num_layers * operations for name, operations in layer.items()}
        total["softmax"] = 3 * 2 * tokens * self.hidden_size * self.vocab_size
        return total

    def bytes(self) -> float:
        """Weights and their gradients move once each; hidden states, keys and values of all memories three times."""
        weights = self.num_layers * (4 * self.hidden_size**2 + 2 * self.hidden_size * self.feedforward_size)
        weights += 2 * self.hidden_size * self.vocab_size
        rows = self.num_layers * self.batch_size * (self.num_memories + self.block_size) * self.hidden_size * 3
        return self.bytes_per_number * (3 * weights + 3 * rows)

    def roofline_seconds(self, device: Device) -> float:
        """The longer of the times for computing and for moving bytes."""
        return max(sum(self.operations().values()) / device.flops, self.bytes() / device.bandwidth)
