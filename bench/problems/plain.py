"""Plain products, and the covariance."""

from __future__ import annotations

import torch

from bench.problem import F32, Problem, Rival, normal, tuned
from bench.products import products


def plain_product(M: int, d: int, dtype: torch.dtype = F32) -> Problem:
    """X @ U of (M,d) and (d,d)."""
    x, U = normal(M, d, dtype=dtype, seed=1), normal(d, d, dtype=dtype, seed=2)
    return Problem(
        "eigenbasis_project",
        {"x": x, "U": U},
        lambda: x.double() @ U.double(),
        tuned(lambda mm: mm(x, U), dtype),
        flops=2 * M * d * d,
        dtype=dtype,
    )


def covariance(M: int, d: int) -> Problem:
    """Half of the full product is needed; numpy finds OpenBLAS's symmetric product when both operands are one array."""
    x, C = normal(M, d), torch.zeros(d, d)
    same = x.clone()
    return Problem(
        "covariance_update_",
        {"C": C, "x": x},
        lambda: x.double().T @ x.double(),
        (
            Rival("torch.addmm_", lambda: C.addmm_(x.T, x), "the peer's formula"),
            *tuned(lambda mm: C.add_(mm(x.T, same))),
            Rival("symmetric product", lambda: C.add_(products(F32)["OpenBLAS"](x.T, x)), "OpenBLAS"),
        ),
        flops=M * d * (d + 1),
        target=C,
    )
