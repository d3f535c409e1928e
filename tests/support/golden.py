"""The authors' numbers (tests/golden), as tensors and as models with their weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from expire_span import ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.memory.packed import Memory
from expire_span.transformer import State

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str) -> SimpleNamespace:
    """Arrays become tensors, scalars become numbers: whole ones integers."""

    def convert(array: np.ndarray):
        if array.shape:
            return torch.from_numpy(array)
        return int(array) if float(array).is_integer() else float(array)

    with np.load(FOLDER / f"{name}.npz") as file:
        return SimpleNamespace(**{key: convert(file[key]) for key in file.files})


def packed(hidden: Tensor, age: Tensor, now: int = 0, born: int = 1) -> Memory:
    """Memories (B, S, d) of the given ages (B, S) at timestep `now`, every sample with S of them."""
    samples, each, _ = hidden.shape
    offsets = torch.arange(samples + 1) * each
    return Memory(hidden.flatten(0, 1), now - age.flatten(), torch.full((samples * each,), born), offsets)


def nearest_first(key_pe: Tensor) -> Tensor:
    """Their position table (1, D, n), farthest first, as ours (n, D)."""
    return key_pe[0].flip(-1).T.contiguous()


OURS = {  # their names of a layer's parameters, in ours
    "wq": "attention.query.weight",
    "wk": "attention.key.weight",
    "wv": "attention.value.weight",
    "wo": "attention.output.weight",
    "ff1_w": "feedforward_in.weight",
    "ff1_b": "feedforward_in.bias",
    "ff2_w": "feedforward_out.weight",
    "ff2_b": "feedforward_out.bias",
    "n1_g": "norm_attention.weight",
    "n1_b": "norm_attention.bias",
    "n2_g": "norm_feedforward.weight",
    "n2_b": "norm_feedforward.bias",
    "span_w": "memory.weight",
    "span_b": "memory.bias",
}


def parameters(g: SimpleNamespace, prefix: str = "") -> dict[str, Tensor]:
    """A golden model's weights (or, with prefix "grad_", their gradients), by our parameters' names."""
    found = {
        "embedding.weight": getattr(g, f"{prefix}in_emb"),
        "output.weight": getattr(g, f"{prefix}out_w"),
        "output.bias": getattr(g, f"{prefix}out_b"),
        "position": nearest_first(getattr(g, f"{prefix}key_pe")),
    }
    for layer in range(2):
        for theirs, ours in OURS.items():
            tensor = getattr(g, f"{prefix}l{layer}_{theirs}", None)
            if tensor is not None:
                flat = tensor.flatten() if theirs == "span_w" else tensor.squeeze() if theirs == "span_b" else tensor
                found[f"layers.{layer}.{ours}"] = flat
    return found


def golden_model(g: SimpleNamespace, expire: bool) -> Transformer:
    """The golden two-layer post-norm model with its weights, in float64."""
    config = TransformerConfig(vocabulary=11, hidden_size=12, heads=g.heads, feedforward_size=20)
    memory = [
        ExpireSpan(12, g.max_span, g.ramp, g.alpha, positions=g.key_pe.shape[-1]) if expire else TransXL(g.max_span)
        for _ in range(2)
    ]
    model = Transformer(config, memory).double()
    model.load_state_dict(parameters(g))
    return model


def zero_state(samples: int, each: int, layers: int = 2, size: int = 12) -> State:
    """What their sequences start with: `each` attendable memories of zeros."""
    ages = torch.arange(each, 0, -1).expand(samples, -1)
    zeros = torch.zeros(samples, each, size, dtype=torch.double)
    return {"now": torch.tensor(0), "layers": [packed(zeros, ages) for _ in range(layers)]}
