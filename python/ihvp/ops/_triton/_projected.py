"""Planes of tokens, as they are or in the eigenbasis: what the sums of squared gradients are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ihvp.ops._gpu import workspace
from ihvp.ops._rows import alike, padded
from ihvp.ops._triton._planes import Planes, planes
from ihvp.ops._triton._product import rows_times


def token_planes(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> tuple[Planes, Planes]:
    """Of tokens; at T = 1 of their squares, which in 16 bits would not be exact, with a common scale."""
    if a.shape[1] == 1:
        return (
            planes(a, mask, bias, common=True, square=True),
            planes(delta, mask, common=True, square=True),
        )
    narrow = alike(a, delta)
    return planes(a, mask, bias, narrow=narrow), planes(delta, mask, narrow=narrow)


def projected(
    op: str, a: Tensor, delta: Tensor, U_A: Tensor, U_G: Tensor, mask: Tensor | None, bias: bool
) -> Iterator[tuple[slice, Planes, Planes]]:
    """(examples, a U_A, delta U_G), a chunk of examples at a time; at T = 1 their squares.

    Of bfloat16 tokens and bases they are bfloat16 at torch's "medium" float32 matmul precision.
    """
    (N, T, _), I, O = a.shape, padded(U_A.shape[1]), padded(U_G.shape[1])
    medium = torch.get_float32_matmul_precision() == "medium" and alike(a, delta, U_A, U_G)
    bases = [pad(U, (0, padded(U.shape[1]) - U.shape[1])) if medium else planes(U.unsqueeze(0)) for U in (U_A, U_G)]
    bytes_each = 8 * T * (O + I)  # planes before and after, or bfloat16 before and float32 after
    chunk, _ = workspace(op, N, bytes_each, lambda n: a.new_empty(n * bytes_each, dtype=torch.uint8))
    for n in range(0, N, chunk):
        part = slice(n, min(n + chunk, N))
        own = None if mask is None else mask[part]
        yield (
            part,
            in_basis(a[part], bases[0], own, bias, narrow=medium),
            in_basis(delta[part], bases[1], own, False, narrow=medium),
        )


def in_basis(x: Tensor, U: Planes | Tensor, mask: Tensor | None, bias: bool, *, narrow: bool) -> Planes:
    own = planes(x, mask, bias, narrow=narrow)
    if x.shape[1] > 1 and isinstance(U, Tensor):  # a plain product of one type, and so the library's
        return Planes(own.high[..., : len(U)] @ U)
    basis = U if isinstance(U, Planes) else planes(U.unsqueeze(0), narrow=True)
    if x.shape[1] > 1:
        return rows_times(own, basis)
    out = torch.empty(*x.shape[:2], basis.high.shape[2], device=x.device)
    rows_times(own, basis, out)
    return planes(out, common=True, square=True)
