"""What the ops compute, written from their docstrings: float64, per-example gradients whole, the op's own name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, einsum


def tokens(x: Tensor, mask: Tensor | None, bias: bool = False) -> Tensor:
    x = x if x.dim() == 3 else x[:, None]
    if bias:
        x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
    return x if mask is None else x.masked_fill(~mask.reshape(x.shape[:2])[..., None], 0)


def gradients(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    return einsum("nto,nti->noi", tokens(delta, mask), tokens(a, mask, bias))


def covariance_update_(C: Tensor, x: Tensor, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    x = tokens(x, mask, bias)
    return C + einsum("nti,ntj->ij", x, x)


def eigenbasis_project(x: Tensor, U: Tensor, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    return einsum("nti,ij->ntj", tokens(x, mask, bias), U).view(*x.shape[:-1], U.shape[1])


def eigenbasis_rotate(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool = False) -> Tensor:
    return einsum("op,...pj,ij->...oi" if inverse else "po,...pj,ji->...oi", U_G, V, U_A)


def rotated(
    a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> Tensor:
    g = gradients(a, delta, mask, bias)
    return g if U_A is None or U_G is None else eigenbasis_rotate(g, U_A, U_G)


def ekfac_diagonal_update_(
    Lambda: Tensor,
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    mask: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    return Lambda + rotated(a, delta, U_A, U_G, mask, bias).square().sum(0)


def ekfac_self_influence(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    return (rotated(a, delta, U_A, U_G, mask, bias).square() / (Lambda + damping)).sum((1, 2))


def ekfac_solve(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: float | Sequence[float]) -> Tensor:
    if isinstance(damping, Sequence):
        solved = [ekfac_solve(V, U_A, U_G, Lambda, value) for value in damping]
        return torch.stack(solved) if solved else V.new_empty(0, *V.shape)
    return eigenbasis_rotate(eigenbasis_rotate(V, U_A, U_G) / (Lambda + damping), U_A, U_G, inverse=True)


def ghost_dot(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    return einsum("moi,noi->mn", gradients(a1, delta1, mask1, bias), gradients(a2, delta2, mask2, bias))


def ghost_norm(a: Tensor, delta: Tensor, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    return gradients(a, delta, mask, bias).square().sum((1, 2))


def gradient_dot(
    P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None = None, bias: bool = False, per_token: bool = False
) -> Tensor:
    terms = einsum("qoi,nto,nti->qnt", P, tokens(delta, mask), tokens(a, mask, bias))
    return terms if per_token else terms.sum(2)


def gradient_dot_low_rank(
    L: Tensor,
    R: Tensor,
    a: Tensor,
    delta: Tensor,
    mask: Tensor | None = None,
    bias: bool = False,
    per_token: bool = False,
) -> Tensor:
    return gradient_dot(L @ R, a, delta, mask, bias, per_token)


def kfac_factorize(A: Tensor, G: Tensor, damping: float, split: str = "pi") -> tuple[Tensor, Tensor]:
    """The damped factors themselves, to be compared with L L^T."""
    pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt() if split == "pi" else 1.0
    return tuple(
        x + shift * torch.eye(len(x), dtype=x.dtype) for x, shift in ((A, pi * damping**0.5), (G, damping**0.5 / pi))
    )


def kfac_solve(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
    A, G = (L.tril() @ L.tril().mT for L in (L_A, L_G))
    return einsum("op,...pj,ji->...oi", torch.linalg.inv_ex(G).inverse, V, torch.linalg.inv_ex(A).inverse)


def per_sample_gradient(a: Tensor, delta: Tensor, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    return gradients(a, delta, mask, bias)


def weighted_ghost_dot(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    g1, g2 = gradients(a1, delta1, mask1, bias), gradients(a2, delta2, mask2, bias)
    return einsum("oi,moi,noi->mn", weight, g1, g2)
