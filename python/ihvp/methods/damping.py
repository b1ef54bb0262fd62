"""Dampings: what a user may give, and what a block makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ihvp.methods.blocks import Block

Damping = float | str | Mapping[str, float | str]
"""A number, "auto", or one of them for each block by its name."""


def check_damping(damping: Any, blocks: Mapping[str, Block]) -> None:
    if isinstance(damping, Mapping):
        if set(damping) != set(blocks):
            raise ValueError(
                f"damping must have a value for every block, {', '.join(map(repr, blocks))}, "
                f"got {', '.join(map(repr, damping)) or 'none'}"
            )
        for value in damping.values():
            _check_one_damping(value)
    else:
        _check_one_damping(damping)


def _check_one_damping(damping: Any) -> None:
    if isinstance(damping, str) and damping == "auto":
        return
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f'damping must be a number or "auto", got {damping!r}')
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, got {damping}")


def resolve_damping(damping: Damping, block: str, mean_eigenvalue: float) -> float:
    """The number for a block; "auto" is 0.1 times its mean eigenvalue."""
    own = damping[block] if isinstance(damping, Mapping) else damping
    if not isinstance(own, str):
        return float(own)
    if mean_eigenvalue < 0:
        raise torch.linalg.LinAlgError(
            f'block {block!r}: damping="auto" needs a mean eigenvalue >= 0, got {mean_eigenvalue:.3g}'
        )
    return 0.1 * mean_eigenvalue


def check_regular(where: str, smallest: float, largest: float, damping: float) -> None:
    """Refuse to divide by eigenvalues that are zero to rounding."""
    lowest = smallest + damping
    if not lowest > (0.0 if damping > 0 else torch.finfo(torch.float32).eps * max(largest, 0.0)):
        raise torch.linalg.LinAlgError(
            f"{where}: the curvature with damping {damping:.3g} is singular: its eigenvalues go from {lowest:.3g} to "
            f"{largest + damping:.3g}; a larger damping helps"
        )
