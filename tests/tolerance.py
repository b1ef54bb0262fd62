"""The one rule for how far a result may lie from its float64 formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tol(dtype: torch.dtype, reduction_length: int) -> float:
    """Relative error of sums of `reduction_length` rounded terms in `dtype`, which grows like the square root.

    bfloat16 and float16 operands are widened without rounding and summed in float32.
    """
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 4 * eps * math.sqrt(max(reduction_length, 4))


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, reduction_length: int) -> None:
    """|got - want| <= tol |want| in the Frobenius norm; `want` is float64, and a zero has to be met exactly."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error, scale = float((got.double() - want).norm()), float(want.norm())
    bound = tol(dtype, reduction_length) * scale
    assert error <= bound, f"error {error:.3g} above {bound:.3g}, {error / (scale or 1):.3g} relative"
