"""Cholesky factors of the damped Kronecker factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ihvp.ops._arguments import check_number, check_tensors, shape_of
from ihvp.ops._registry import Op

SPLITS = ("pi", "even")


def kfac_factorize(A: Tensor, G: Tensor, damping: float, *, split: str = "pi") -> tuple[Tensor, Tensor]:
    """Split a damping over two Kronecker factors and factorize both.

    L_A L_A^T = A + pi sqrt(damping) I and L_G L_G^T = G + sqrt(damping)/pi I, with
    pi = sqrt((tr A / dim A) / (tr G / dim G)) for split="pi" and pi = 1 for split="even".

    Args:
        A: (I',I') activation second moment; G: (O,O) gradient second moment; float32 or float64.
        damping: a number >= 0.
        split: "pi" or "even". The undivided damping, split="none", has no Cholesky form: use `ekfac_solve` with
            Lambda = outer(lambda_G, lambda_A).

    Returns:
        (L_A, L_G), lower triangular, in the dtype of A and G.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, a negative damping, an unknown split.
        torch.linalg.LinAlgError: a damped factor is not positive definite; names the factor.

    Source: Martens and Grosse 2015 (arXiv:1503.05671), section 6.3.
    """
    check_tensors(A=A, G=G)
    for name, x in (("A", A), ("G", G)):
        if x.dim() != 2 or x.shape[0] != x.shape[1] or x.shape[0] == 0:
            raise ValueError(f"{name} must be a square matrix, got {shape_of(x)}")
        if x.dtype not in (torch.float32, torch.float64) or x.dtype != A.dtype:
            raise TypeError(f"A and G must both be float32 or both float64, got {A.dtype} and {G.dtype}")
    value = check_number("damping", damping)
    if value < 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    result: tuple[Tensor, Tensor] = _op(A, G, value, split)
    return result


def reference(A: Tensor, G: Tensor, damping: float, split: str) -> tuple[Tensor, Tensor]:
    pi = 1.0
    if split == "pi":
        mean_A, mean_G = A.diagonal().mean().item(), G.diagonal().mean().item()
        if not (0 < mean_A < math.inf and 0 < mean_G < math.inf):
            raise torch.linalg.LinAlgError(
                f'split="pi" needs finite, positive traces, got mean diagonals {mean_A:.3g} of A and {mean_G:.3g} of G'
            )
        pi = math.sqrt(mean_A / mean_G)
    factors = []
    for name, factor, shift in (("A", A, pi * math.sqrt(damping)), ("G", G, math.sqrt(damping) / pi)):
        damped = factor.clone()
        damped.diagonal().add_(shift)
        L, info = torch.linalg.cholesky_ex(damped)
        if info.item() != 0 or not math.isfinite(L.diagonal().sum().item()):
            raise torch.linalg.LinAlgError(
                f"{name} + {shift:.3g} I is not positive definite (leading minor {info.item()}); a larger damping helps"
            )
        factors.append(L.contiguous())
    return factors[0], factors[1]


_op = Op(
    "kfac_factorize",
    "(Tensor A, Tensor G, float damping, str split) -> (Tensor, Tensor)",
    {"reference": reference},
    fake=lambda A, G, damping, split: (torch.empty_like(A), torch.empty_like(G)),
)
