"""One table of tolerances by dtype, and a comparison that says which quantity differs."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_equal(name: str, ours: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """Largest absolute difference below the tolerance of our dtype; NaN differs from everything."""
    assert ours.shape == reference.shape, f"{name}: shape {tuple(ours.shape)} is not {tuple(reference.shape)}"
    tolerance = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    error = (ours.double() - reference.double()).abs().max().item() if ours.numel() else 0.0
    assert error <= tolerance, f"{name} differs by {error:.3g}, more than {tolerance:.3g}"
