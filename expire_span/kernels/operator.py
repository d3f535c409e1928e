"""The fused forms of packed attention as one operator with a gradient, which torch.compile passes through."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from . import packed_cpp

KERNELS = ("auto", "cpp", "triton", "torch", "definition")


def form(kernel: str, device: str, dtype: torch.dtype) -> str:
    """Which one `kernel` stands for on a kind of device. Raises ValueError where it cannot be had."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel == "cpp" or (kernel == "auto" and device == "cpu"):
        if device == "cpu" and packed_cpp.available():
            return "cpp"
        if kernel == "cpp":
            raise ValueError("kernel='cpp' is for a CPU, and needs a C++ compiler: c++, g++, or what CXX names")
    if kernel == "triton" or (kernel == "auto" and device == "cuda" and dtype != torch.float64):
        with suppress(ImportError):
            if import_module(".packed_triton", __package__).available():
                return "triton"
        if kernel == "triton":
            raise ValueError("kernel='triton' needs Triton and a CUDA device, or its interpreter (TRITON_INTERPRET=1)")
    return kernel if kernel == "definition" else "torch"


def module(kernel: str, like: Tensor) -> Any:
    """The one with the form's `forward` and `backward`."""
    chosen = form(kernel, like.device.type, like.dtype)
    if chosen == "cpp":
        return packed_cpp
    if chosen == "triton":
        return import_module(".packed_triton", __package__)
    raise ValueError("transformer.kernel=auto finds neither C++ nor Triton, as torch.compile needs; take kernel=torch")


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None,
    rows: Tensor | None,
    reach: Tensor | None,
    bias: Tensor | None,
    born: Tensor | None,
    dropout: float,
    seed: int,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """out (B, H, T, D), and what the backward pass of the form wants besides."""
    given = (query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed)
    with torch.autocast(query.device.type, enabled=False):
        return module(kernel, query).forward(*given)


def backward(
    gradient: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    age: Tensor,
    span: Tensor,
    ramp: float,
    position: Tensor | None,
    rows: Tensor | None,
    reach: Tensor | None,
    bias: Tensor | None,
    born: Tensor | None,
    dropout: float,
    seed: int,
    kernel: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key, value, span, position and bias; empty where not needed."""
    given = (query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed)
    with torch.autocast(query.device.type, enabled=False):
        found = module(kernel, query).backward(gradient, out, lse, *given, needs)
    return [query.new_empty(0) if each is None else each for each in found]


attention = custom_op("expire_span::attention", forward, mutates_args=())
attention_backward = custom_op("expire_span::attention_backward", backward, mutates_args=())


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, age: Tensor, span: Tensor, *rest: Any):
    samples, heads, block, size = query.shape
    out = query.new_empty(samples, block, heads, size).transpose(1, 2)
    dtype = torch.promote_types(torch.promote_types(query.dtype, span.dtype), torch.float32)
    return out, query.new_empty(samples, heads, block, dtype=dtype)


@attention_backward.register_fake
def _(gradient: Tensor, out: Tensor, lse: Tensor, query, key, value, offsets, age, span, ramp, position, *rest: Any):
    samples, heads, block, size = query.shape
    of_query = query.new_empty(samples, block, heads, size).transpose(1, 2)
    of_others = [None if each is None else each.new_empty(each.shape) for each in (key, value, span, position, rest[2])]
    given = zip((of_query, *of_others), rest[-1], strict=True)
    return [each if need and each is not None else query.new_empty(0) for each, need in given]


def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    (query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed, kernel) = inputs
    out, lse = output
    ctx.save_for_backward(out, lse, query, key, value, offsets, age, span, position, rows, reach, bias, born)
    ctx.others = ramp, dropout, seed, kernel
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, gradient: Tensor | None, through: Callable[..., list[Tensor]]) -> tuple:
    if gradient is None:
        return (None,) * 15
    out, lse, query, key, value, offsets, age, span, position, rows, reach, bias, born = ctx.saved_tensors
    ramp, dropout, seed, kernel = ctx.others
    by_input = ctx.needs_input_grad
    needs = [by_input[number] for number in (0, 1, 2, 5, 7, 10)]
    given = (query, key, value, offsets, age, span, ramp, position, rows, reach, bias, born, dropout, seed, kernel)
    found = through(gradient, out, lse, *given, needs)
    q, k, v, s, p, b = (each if need else None for each, need in zip(found, needs, strict=True))
    return q, k, v, None, None, s, None, p, None, None, b, None, None, None, None


attention.register_autograd(
    lambda ctx, gradient, _: gradients(ctx, gradient, torch.ops.expire_span.attention_backward), setup_context=setup
)


class Eager(torch.autograd.Function):
    """The same where nothing is compiled: an operator in Python costs more than a small attention."""

    setup_context = staticmethod(setup)

    @staticmethod
    def forward(*given: Any) -> tuple[Tensor, Tensor]:
        return forward(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple:
        return gradients(ctx, gradient, backward)
