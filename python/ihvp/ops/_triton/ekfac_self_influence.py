"""sum_oi (U_G^T g_n U_A)^2 / (Lambda + damping): the weighted sum of squares is the epilogue of an example's tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._triton._projected import projected
from ihvp.ops._triton.gradient_dot import row_dot
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
        return influence(a, delta, weight, mask, bias)
    out = torch.empty(N, device=a.device)
    for part, x, d in projected("ekfac_self_influence", a, delta, U_A, U_G, mask, bias):
        out[part] = influence(x, d, weight, None, False)
    return out


def influence(a: Tensor, delta: Tensor, weight: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """At T = 1 the square of the product is the product of the squares, and the sum a row dot."""
    if a.shape[1] == 1:
        return row_dot(weight.unsqueeze(0), a, delta, mask, bias, squared=True)[0]
    return weighted_squares(a, delta, weight, mask, bias)
