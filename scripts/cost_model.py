"""What a training step must cost at least: operations and bytes, from the sizes and the number of survivors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """flops: multiplications and additions a second of a large matrix product; bandwidth: bytes a second."""

    name: str
    flops: float
    bandwidth: float


H100 = Device("H100 (65 % of 989 TFLOP/s bf16, 85 % of 3.35 TB/s)", 0.65 * 989e12, 0.85 * 3.35e12)


@dataclass(frozen=True)
class Step:
    """One block of all streams, forward and backward. survivors: memories of a stream in a layer, on average."""

    layers: int
    hidden: int
    heads: int
    feedforward: int
    vocabulary: int
    batch: int
    block: int
    survivors: float
    positions: int
    bytes_each: int = 4
    pre_norm: bool = False  # memories are normalised, and so their keys and values have gradients of their inputs too

    def operations(self) -> dict[str, float]:
        """A product of (n, a) and (a, b) is 2 n a b operations; backward is twice that, but for inputs without any."""
        tokens, memories = self.batch * self.block, self.batch * self.survivors
        pairs = self.block * (memories + tokens)  # of query and key, in all heads together d wide
        near = self.block * self.batch * min(self.positions, self.survivors + self.block)
        layer = {
            "query, output": 3 * 2 * tokens * 2 * self.hidden**2,
            "keys, values": ((3 if self.pre_norm else 2) * memories + 3 * tokens) * 2 * 2 * self.hidden**2,
            "attention": 3 * 2 * 2 * pairs * self.hidden,
            "positions": 3 * 2 * near * self.hidden,
            "feed-forward": 3 * 2 * tokens * 2 * self.hidden * self.feedforward,
        }
        total = {name: self.layers * operations for name, operations in layer.items()}
        total["softmax"] = 3 * 2 * tokens * self.hidden * self.vocabulary
        return total

    def bytes(self) -> float:
        """Weights and their gradients once each way; hidden states, keys and values of all survivors three times."""
        weights = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.feedforward)
        weights += 2 * self.hidden * self.vocabulary
        rows = self.layers * self.batch * (self.survivors + self.block) * self.hidden * 3
        return self.bytes_each * (3 * weights + 3 * rows)

    def floor(self, device: Device) -> float:
        """Seconds: the slower of computing and moving."""
        return max(sum(self.operations().values()) / device.flops, self.bytes() / device.bandwidth)
