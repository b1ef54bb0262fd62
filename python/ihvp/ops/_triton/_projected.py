"""Tokens in the eigenbasis, a chunk of examples at a time: what the sums of squared gradients are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._launch import arithmetic
from ihvp.ops._triton.eigenbasis_project import project


def projected_dtype(*operands: Tensor) -> torch.dtype:
    """In which type tokens are kept between two products."""
    medium = torch.get_float32_matmul_precision() == "medium"
    return torch.bfloat16 if medium and all(x.dtype == torch.bfloat16 for x in operands) else torch.float32


def padded(features: int) -> int:
    """Rows of a multiple of 16 elements are read 16 bytes at a time."""
    return -(-features // 16) * 16


def projected(
    op: str, a: Tensor, delta: Tensor, U_A: Tensor, U_G: Tensor, mask: Tensor | None, bias: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(examples, a U_A, delta U_G): mask and bias are in them, and zeros up to the padded width.

    The memory of one chunk serves for the next.
    """
    (N, T, _), I, O = a.shape, padded(U_A.shape[1]), padded(U_G.shape[1])
    dtype = projected_dtype(a, delta, U_A, U_G)
    chunk, (x, d) = workspace(
        op,
        N,
        T * (O + I) * dtype.itemsize,
        lambda n: (a.new_empty(n, T, I, dtype=dtype), a.new_empty(n, T, O, dtype=dtype)),
    )
    for n in range(0, N, chunk):
        part = slice(n, min(n + chunk, N))
        own = None if mask is None else mask[part]
        yield (
            part,
            project(x[: part.stop - n], a[part], U_A, own, bias, arithmetic(a, U_A)),
            project(d[: part.stop - n], delta[part], U_G, own, False, arithmetic(delta, U_G)),
        )
