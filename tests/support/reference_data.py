"""Test vectors of the authors' released code (tests/golden), as tensors and as models with their weights."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from expire_span import ExpireSpan, Transformer, TransformerConfig, TransXL
from expire_span.memory.packed import Memory
from expire_span.transformer import State

FOLDER = Path(__file__).parents[1] / "golden"


def load_reference(name: str) -> SimpleNamespace:
    """Load a file: arrays become tensors, scalars become numbers (integers where they are whole)."""

    def convert(array: np.ndarray):
        if array.shape:
            return torch.from_numpy(array)
        return int(array) if float(array).is_integer() else float(array)

    with np.load(FOLDER / f"{name}.npz") as file:
        return SimpleNamespace(**{key: convert(file[key]) for key in file.files})


def packed_memory(hidden: Tensor, age: Tensor, min_distance: int = 1) -> Memory:
    """Make a memory of hidden states (B, S, d) that have the given ages (B, S) at timestep 0."""
    batch_size, num_rows, _ = hidden.shape
    offsets = torch.arange(batch_size + 1) * num_rows
    min_distances = torch.full((batch_size * num_rows,), min_distance)
    return Memory(hidden.flatten(0, 1), -age.flatten(), min_distances, offsets)


def nearest_first(key_pe: Tensor) -> Tensor:
    """Convert their position table (1, D, n), farthest distance first, to ours (n, D), nearest first."""
    return key_pe[0].flip(-1).T.contiguous()


PARAMETER_NAMES = {  # from their names of a layer's parameters to ours
    "wq": "attention.query_proj.weight",
    "wk": "attention.key_proj.weight",
    "wv": "attention.value_proj.weight",
    "wo": "attention.output_proj.weight",
    "ff1_w": "up_proj.weight",
    "ff1_b": "up_proj.bias",
    "ff2_w": "down_proj.weight",
    "ff2_b": "down_proj.bias",
    "n1_g": "attention_norm.weight",
    "n1_b": "attention_norm.bias",
    "n2_g": "feedforward_norm.weight",
    "n2_b": "feedforward_norm.bias",
    "span_w": "mechanism.weight",
    "span_b": "mechanism.bias",
}


def parameters(g: SimpleNamespace, prefix: str = "") -> dict[str, Tensor]:
    """Return the reference model's weights, or with prefix "grad_" their gradients, by the names of our parameters."""
    result = {
        "embedding.weight": getattr(g, f"{prefix}in_emb"),
        "output_head.weight": getattr(g, f"{prefix}out_w"),
        "output_head.bias": getattr(g, f"{prefix}out_b"),
        "position": nearest_first(getattr(g, f"{prefix}key_pe")),
    }
    for layer in range(2):
        for theirs, ours in PARAMETER_NAMES.items():
            tensor = getattr(g, f"{prefix}l{layer}_{theirs}", None)
            if tensor is not None:
                flat = tensor.flatten() if theirs == "span_w" else tensor.squeeze() if theirs == "span_b" else tensor
                result[f"layers.{layer}.{ours}"] = flat
    return result


def reference_model(g: SimpleNamespace, expire: bool) -> Transformer:
    """Build the authors' two-layer post-norm model with its weights, in float64."""
    config = TransformerConfig(vocab_size=11, hidden_size=12, num_heads=g.heads, feedforward_size=20)
    mechanisms = [
        ExpireSpan(12, g.max_span, g.ramp, g.alpha, num_positions=g.key_pe.shape[-1]) if expire else TransXL(g.max_span)
        for _ in range(2)
    ]
    model = Transformer(config, mechanisms).double()
    model.load_state_dict(parameters(g))
    return model


def zero_state(batch_size: int, num_memories: int, num_layers: int = 2, hidden_size: int = 12) -> State:
    """Return the state that their sequences start with: visible memories of zeros."""
    ages = torch.arange(num_memories, 0, -1).expand(batch_size, -1)
    zeros = torch.zeros(batch_size, num_memories, hidden_size, dtype=torch.double)
    return {"step": torch.tensor(0), "layers": [packed_memory(zeros, ages) for _ in range(num_layers)]}
