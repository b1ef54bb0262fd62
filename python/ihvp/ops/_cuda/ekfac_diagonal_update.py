"""Lambda += sum_n (U_G^T g_n U_A)^2 of 16-bit tokens: projected by torch, squared and summed in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ihvp import _cuda
from ihvp.ops._cuda._launch import rows_of, stream_of
from ihvp.ops._gpu import parts_of, workspace
from ihvp.ops._rows import padded

EXAMPLES = 4096  # squares summed in float32 before they are added to Lambda, which may be wider


def run(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    (N, T, _), (O, I) = a.shape, Lambda.shape
    if N * T * O * I == 0:
        return
    out = Lambda if Lambda.is_contiguous() else torch.zeros(O, I, dtype=Lambda.dtype, device=a.device)
    bytes_each = 4 * T * (padded(I) + padded(O))  # tokens in the basis, and before that what is projected
    examples = min(
        EXAMPLES,
        workspace("ekfac_diagonal_update_", N, bytes_each, lambda n: a.new_empty(n * bytes_each, dtype=torch.uint8))[0],
    )
    bases = [None if U is None else pad(U, (0, padded(U.shape[1]) - U.shape[1])) for U in (U_A, U_G)]
    with stream_of(a) as stream:
        for n in range(0, N, examples):
            part = slice(n, n + examples)
            own = None if mask is None else mask[part]
            x, d = (
                in_basis(rows_of(y[part], own, column), U)
                for y, U, column in ((a, bases[0], bias), (delta, bases[1], False))
            )
            cut = parts_of(a.device, -(-O // 128) * -(-I // 128), x.shape[0])
            _cuda.ekfac_diagonal_update(out, torch.empty(cut, O, I, device=a.device), d, x, stream)
    if out is not Lambda:
        Lambda += out


def in_basis(x: Tensor, U: Tensor | None) -> Tensor:
    """A plain product of one type, and so the library's."""
    return x if U is None else x[..., : len(U)] @ U
