"""Kronecker solves by Cholesky factors."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Problem, Rival, normal


def spd(d: int, seed: int) -> Tensor:
    x = normal(2 * d, d, seed=seed)
    return x.T @ x / (2 * d)


def factorize(O: int, I: int) -> Problem:
    A, G, damping = spd(I, 1), spd(O, 2), 1e-2

    def plain(A: Tensor, G: Tensor) -> Tensor:
        pi = float((A.trace() / I / (G.trace() / O)).sqrt())
        damped = (A + pi * damping**0.5 * torch.eye(I), G + damping**0.5 / pi * torch.eye(O))
        return torch.cat([torch.linalg.cholesky(x).flatten() for x in damped])

    return Problem(
        "kfac_factorize",
        {"A": A, "G": G, "damping": damping},
        lambda: plain(A.double(), G.double()),
        (Rival("torch.linalg.cholesky", lambda: plain(A, G)),),
        flops=(O**3 + I**3) / 3,
    )


def kronecker_solve(Q: int, O: int, I: int) -> Problem:
    L_A, L_G = (torch.linalg.cholesky(spd(d, seed) + 0.1 * torch.eye(d)) for d, seed in ((I, 1), (O, 2)))
    V = normal(Q, O, I)

    def plain(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
        """All right-hand sides of a factor in one solve: G^-1 V, then A^-1 V^T."""
        left = torch.cholesky_solve(V.transpose(0, 1).reshape(O, Q * I), L_G).view(O, Q, I)
        return torch.cholesky_solve(left.reshape(O * Q, I).T, L_A).T.reshape(O, Q, I).transpose(0, 1)

    return Problem(
        "kfac_solve",
        {"V": V, "L_A": L_A, "L_G": L_G},
        lambda: plain(V.double(), L_A.double(), L_G.double()),
        (Rival("torch.cholesky_solve", lambda: plain(V, L_A, L_G)),),
        flops=2 * Q * O * I * (O + I),
    )
