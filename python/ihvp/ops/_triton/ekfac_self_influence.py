"""sum_oi (U_G^T g_n U_A)^2 / (Lambda + damping): the weighted sum of squares is the epilogue of an example's tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._triton._planes import Planes, planes
from ihvp.ops._triton._product import row_dots
from ihvp.ops._triton._projected import projected, token_planes
from ihvp.ops._triton.per_sample_gradient import weighted_squares


def run(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
) -> Tensor:
    (N, T, _), (O, I) = a.shape, Lambda.shape
    if N * T * O * I == 0:
        return torch.zeros(N, device=a.device)
    weight = 1 / (Lambda.float().contiguous() + damping)
    if U_A is None or U_G is None:
        return influence(*token_planes(a, delta, mask, bias), weight, T)
    out = torch.empty(N, device=a.device)
    for part, x, d in projected("ekfac_self_influence", a, delta, U_A, U_G, mask, bias):
        out[part] = influence(x, d, weight, T)
    return out


def influence(a: Planes, delta: Planes, weight: Tensor, T: int) -> Tensor:
    """At T = 1 of planes of squares: the square of the product is the product of the squares, the sum a row dot."""
    if T == 1:
        return row_dots(planes(weight.unsqueeze(0)), a, delta)[0]
    return weighted_squares(a, delta, weight)
