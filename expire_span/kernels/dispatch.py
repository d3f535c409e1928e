"""Select a backend, and run the fused ones as one differentiable operator that torch.compile need not trace into."""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from . import cpp_backend
from .inputs import DIFFERENTIABLE, AttentionInputs

BACKENDS = ("auto", "cpp", "triton", "torch", "reference")


def select_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """Resolve "auto" to the first backend available for a device and dtype, and check that a named one is available.

    Raises:
        ValueError: If the backend is unknown or not available.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "cpp" or (backend == "auto" and device_type == "cpu"):
        if device_type == "cpu" and cpp_backend.available():
            return "cpp"
        if backend == "cpp":
            raise ValueError("backend='cpp' is for the CPU and needs a C++ compiler: g++, c++ or the one in CXX")
    if backend == "triton" or (backend == "auto" and device_type == "cuda" and dtype != torch.float64):
        with suppress(ImportError):
            if import_module(".triton_backend", __package__).available():
                return "triton"
        if backend == "triton":
            raise ValueError("backend='triton' needs Triton and a CUDA device, or its interpreter (TRITON_INTERPRET=1)")
    return backend if backend == "reference" else "torch"


def backend_module(backend: str, like: Tensor) -> Any:
    """Return the module with the `forward` and `backward` of the fused backend selected for tensors such as `like`.

    Raises:
        ValueError: If there is no fused one.
    """
    selected = select_backend(backend, like.device.type, like.dtype)
    if selected == "cpp":
        return cpp_backend
    if selected == "triton":
        return import_module(".triton_backend", __package__)
    raise ValueError(
        "torch.compile needs the C++ or the Triton backend, and neither is available; use attention_backend=torch"
    )


def fused_attention(inputs: AttentionInputs, backend: str) -> Tensor:
    """Compute packed attention, (B, H, T, D), without keeping the scores for the backward pass."""
    compiling = torch.compiler.is_compiling()
    operator = torch.ops.expire_span.attention if compiling else EagerAttention.apply
    out, _ = operator(*inputs, backend)
    return out


# The arguments of the operators: the fields of AttentionInputs, then the backend.
FIELDS = AttentionInputs.__annotations__
NUM_TENSORS = sum(kind in (Tensor, Tensor | None) for kind in FIELDS.values())
GRAD_INDICES = [AttentionInputs._fields.index(name) for name in DIFFERENTIABLE]
SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int"}
SCHEMA = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in FIELDS.items()) + ", str backend"


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, D) and lse (B, H, T), the log-sum-exp of each query's scores, which backward needs."""
    inputs, backend = AttentionInputs(*args[:-1]), args[-1]
    with torch.autocast(inputs.query.device.type, enabled=False):
        return backend_module(backend, inputs.query).forward(inputs)


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    """Return the gradients of DIFFERENTIABLE, empty where the last argument, a list of bools, does not ask for one."""
    inputs, backend, needs_grad = AttentionInputs(*args[:-2]), args[-2], args[-1]
    with torch.autocast(grad_out.device.type, enabled=False):
        grads = backend_module(backend, inputs.query).backward(grad_out, out, lse, inputs, needs_grad)
    return [inputs.query.new_empty(0) if grad is None else grad for grad in grads]


attention = custom_op("expire_span::attention", forward, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
attention_backward = custom_op(
    "expire_span::attention_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor out, Tensor lse, {SCHEMA}, bool[] needs_grad) -> Tensor[]",
)


@attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    inputs = AttentionInputs(*args[:-1])
    samples, heads, block, head_dim = inputs.query.shape
    out = inputs.query.new_empty(samples, block, heads, head_dim).transpose(1, 2)
    dtype = torch.promote_types(torch.promote_types(inputs.query.dtype, inputs.span.dtype), torch.float32)
    return out, inputs.query.new_empty(samples, heads, block, dtype=dtype)


@attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    inputs, needs_grad = AttentionInputs(*args[:-2]), args[-1]
    samples, heads, block, head_dim = inputs.query.shape
    grads = []
    for name, needed in zip(DIFFERENTIABLE, needs_grad, strict=True):
        tensor = getattr(inputs, name)
        if tensor is None or not needed:
            grads.append(inputs.query.new_empty(0))
        elif name == "query":
            grads.append(tensor.new_empty(samples, block, heads, head_dim).transpose(1, 2))
        else:
            grads.append(tensor.new_empty(tensor.shape))
    return grads


def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:NUM_TENSORS])
    ctx.constants = inputs[NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, grad_out: Tensor | None, backward: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    """Return the gradients of all arguments of the operator, computed by `backward`."""
    grads: list[Tensor | None] = [None] * (len(FIELDS) + 1)
    if grad_out is not None:
        needs_grad = [ctx.needs_input_grad[index] for index in GRAD_INDICES]
        computed = backward(grad_out, *ctx.saved_tensors, *ctx.constants, needs_grad)
        for index, grad, needed in zip(GRAD_INDICES, computed, needs_grad, strict=True):
            grads[index] = grad if needed else None
    return tuple(grads)


attention.register_autograd(
    lambda ctx, grad_out, _: gradients(ctx, grad_out, torch.ops.expire_span.attention_backward),
    setup_context=setup_context,
)


class EagerAttention(torch.autograd.Function):
    """The same operator for eager mode, where calling a custom_op costs more than a small attention."""

    setup_context = staticmethod(setup_context)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return forward(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple:
        return gradients(ctx, grad_out, backward)
