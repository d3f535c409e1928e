"""Multi-head attention whose keys and values are packed memories (section 3, with the soft mask of section 4.1)."""

from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.nn.functional import linear

from .attention import packed_span_attention
from .memory.packed import Memory


class MemoryAttention(nn.Module):
    """The projections of one layer around `packed_span_attention`; they have no bias.

    Args:
        hidden_size: d.
        num_heads: H, the number of attention heads.
        dropout: Of the attention weights.
        backend: Of `packed_span_attention`.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.0, backend: str = "auto"):
        super().__init__()
        self.num_heads, self.dropout, self.backend = num_heads, dropout, backend
        self.query_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.output_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        memory: Memory,
        *,
        age: Tensor,
        ramp: float,
        position: Tensor,
        rows: Tensor | None = None,
        reach: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from a block to everything in a memory, which has the block's own states as its last part.

        Args:
            hidden: (B, T, d), the block.
            memory: N rows, with keys, values and spans.
            age: (N,), timesteps from each row to the block's first query.
            ramp, position, rows, reach, bias: As in `packed_span_attention`.

        Returns:
            (B, T, d)
        """
        assert memory.kv is not None
        key, value, span = memory.kv  # (N, H, D), (N, H, D), (N, H or 1)
        query = self.split_heads(self.query_proj(hidden)).transpose(1, 2)  # (B, H, T, D)
        output = packed_span_attention(
            query,
            key,
            value,
            memory.offsets,
            age=age,
            span=span,
            ramp=ramp,
            position=position,
            rows=rows,
            reach=reach,
            bias=bias,
            min_distance=memory.min_distance,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )  # (B, H, T, D)
        return self.output_proj(output.transpose(1, 2).flatten(2))

    def mass(
        self, hidden: Tensor, memory: Memory, queries: slice, age: Tensor, reach: Tensor | None, **options: Any
    ) -> Tensor:
        """Return the attention weights that each memory gets, without dropout, summed over some queries: (N, H).

        An output is the sum of weight times value, so this is its gradient in the values.

        Args:
            hidden, memory, age, reach: As in `forward`.
            queries: Which of the block's queries, without a step.
            options: The other arguments of `forward`.
        """
        assert memory.kv is not None
        with torch.inference_mode(False), torch.enable_grad():
            key, value, span = (constant(tensor) for tensor in memory.kv)
            value = torch.zeros_like(value).requires_grad_()
            query = self.split_heads(self.query_proj(constant(hidden)[:, queries])).detach().transpose(1, 2)
            others: dict[str, Any] = {
                name: constant(option) if isinstance(option, Tensor) else option for name, option in options.items()
            }
            output = packed_span_attention(
                query,  # (B, H, queries, D)
                key,
                value,
                constant(memory.offsets),
                age=constant(age) + queries.indices(hidden.shape[1])[0],
                span=span,
                reach=None if reach is None else constant(reach)[:, queries],
                min_distance=constant(memory.min_distance),
                backend=self.backend,
                **others,
            )
            (mass,) = autograd.grad(output.sum(), value)
        return mass[..., 0]

    def keys_and_values(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Project hidden states (N, d) to keys and values, (N, H, D) each."""
        return self.split_heads(self.key_proj(hidden)), self.split_heads(self.value_proj(hidden))

    def keys_and_values_of_parts(self, hidden: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Project hidden states (N, d) that are the concatenation of `parts`; the gradient goes to the parts."""
        key, value = KeyValueProjection.apply(hidden, self.key_proj.weight, self.value_proj.weight, *parts)
        return self.split_heads(key), self.split_heads(value)

    def split_heads(self, states: Tensor) -> Tensor:  # (..., d) -> (..., H, D)
        return states.unflatten(-1, (self.num_heads, -1))


def constant(tensor: Tensor) -> Tensor:
    """Return a tensor without its history, that autograd can save."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


class KeyValueProjection(autograd.Function):
    """Two linear layers over the same hidden states (N, d), given once as a whole and once as parts (n, d).

    Forward needs one matmul per layer for all parts. For backward only the parts are saved, which exist anyway, so that
    the whole can be freed; and only parts that require a gradient get one, which carried memories do not.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, key_weight: Tensor, value_weight: Tensor, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(key_weight, value_weight, *parts)
        return linear(hidden, key_weight), linear(hidden, value_weight)

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        key_weight, value_weight, *parts = (tensor.to(grad_key.dtype) for tensor in ctx.saved_tensors)
        sizes = [len(part) for part in parts]
        grad_keys, grad_values = grad_key.split(sizes), grad_value.split(sizes)
        grad_key_weight = sum(grad.T @ part for grad, part in zip(grad_keys, parts, strict=True))
        grad_value_weight = sum(grad.T @ part for grad, part in zip(grad_values, parts, strict=True))
        grad_parts = [
            grad_k @ key_weight + grad_v @ value_weight if needs_grad else None
            for grad_k, grad_v, needs_grad in zip(grad_keys, grad_values, ctx.needs_input_grad[3:], strict=True)
        ]
        return None, grad_key_weight, grad_value_weight, *grad_parts
