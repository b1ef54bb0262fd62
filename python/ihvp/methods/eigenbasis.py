"""Queries and quadratic forms of a curvature that is diagonal in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from torch import Tensor

from ihvp import ops
from ihvp.methods.queries import DenseQueries, Eigenbasis, EigenbasisQueries, LayerQueries
from ihvp.model import Layer


def eigenbasis_queries(
    layer: Layer,
    a: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    U_A: Tensor,
    U_G: Tensor,
    Lambda: Tensor,
    damping: float,
) -> LayerQueries:
    """One position an example: tokens in the eigenbasis. More: P itself, solved; of few positions the tokens go into
    the eigenbasis instead of the gradients, where that is half the work or less."""
    T, (O, I) = a.shape[1], layer.shape
    if T > 1 and 2 * T * (O * O + I * I) > O * I * (O + I):
        g = ops.per_sample_gradient(a, delta, mask=mask, bias=layer.bias)
        return DenseQueries(ops.ekfac_solve(g, U_A, U_G, Lambda, damping))
    x = ops.eigenbasis_project(a, U_A, mask=mask, bias=layer.bias)
    d = ops.eigenbasis_project(delta, U_G, mask=mask)
    if T == 1:
        return EigenbasisQueries(x[:, 0], d[:, 0], Eigenbasis(U_A, U_G, 1 / (Lambda + damping)))
    rotated = ops.per_sample_gradient(x, d).div_(Lambda + damping)
    return DenseQueries(ops.eigenbasis_rotate(rotated, U_A, U_G, inverse=True))


def eigenbasis_quadratic(
    layer: Layer,
    a: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    power: int,
) -> Tensor:
    """g_n^T (F + damping I)^-power g_n: for power 2 the eigenvalues are (Lambda + damping)^2, without damping."""
    if power == 2:
        Lambda, damping = (Lambda + damping).square(), 0.0
    return ops.ekfac_self_influence(a, delta, U_A, U_G, Lambda, damping, mask=mask, bias=layer.bias)
