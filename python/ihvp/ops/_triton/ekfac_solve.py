"""Four products; the second divides by (Lambda + damping) as it ends, once for each damping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._launch import ACCURATE
from ihvp.ops._triton.eigenbasis_project import project
from ihvp.ops._triton.eigenbasis_rotate import rotate_rows


def on_device(damping: Sequence[float], device: torch.device) -> Tensor:
    """Filled one by one: a copy from the host would wait for the stream."""
    shifts = torch.empty(len(damping), device=device)
    for shift, value in zip(shifts, damping, strict=True):
        shift.fill_(value)
    return shifts


def run(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float]) -> Tensor:
    D, (Q, O, I) = len(damping), V.shape
    out = torch.empty(D, Q, O, I, device=V.device)
    if out.numel() == 0:
        return out
    shifts = on_device(damping, V.device)
    chunk, space = workspace(
        "ekfac_solve", Q, 4 * O * I * (D + 1), lambda q: torch.empty(D + 1, q, O, I, device=V.device)
    )
    for q in range(0, Q, chunk):
        part = V[q : q + chunk]
        half, rotated = space[0, : len(part)], space[1:, : len(part)]
        rotate_rows(rotated, U_G, project(half, part, U_A, None, False, ACCURATE), (Lambda, shifts))
        for d in range(D):
            rotate_rows(out[d, q : q + chunk], U_G.T, project(half, rotated[d], U_A.T, None, False, ACCURATE))
    return out
