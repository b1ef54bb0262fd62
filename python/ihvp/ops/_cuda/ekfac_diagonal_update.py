"""Lambda += sum_n (U_G^T g_n U_A)^2: tokens projected by torch, squares summed in registers by the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._arguments import read_tokens
from ihvp.ops._cuda._launch import affordable, padded, parts, rows_of, stream_of, terms


def project(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool, dtype: torch.dtype) -> Tensor:
    """Tokens in the eigenbasis, in padded rows; the bias row of U is added where a position is real."""
    wide = U.to(dtype)
    y = read_tokens(x, mask, False, dtype) @ wide[: x.shape[2]]
    if bias:
        y = y + (wide[-1] if mask is None else mask.unsqueeze(-1) * wide[-1])
    return torch.nn.functional.pad(y, (0, padded(U.shape[1]) - U.shape[1]))


def run(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    (N, T, _), (O, I) = a.shape, Lambda.shape
    if N * T * O * I == 0:
        return
    bases = [U for U in (U_A, U_G) if U is not None]
    narrow = T > 1 and all(x.dtype == torch.bfloat16 for x in (a, delta, *bases))
    # Without a basis the products of bfloat16 tokens are exact; projected tokens are kept so at "medium" alone.
    narrow = narrow and (not bases or torch.get_float32_matmul_precision() == "medium")
    dtype = torch.bfloat16 if narrow else torch.float32
    # Tokens in the basis, and before that what is projected.
    bytes_each = 2 * T * (padded(I) + padded(O)) * dtype.itemsize
    examples = affordable("ekfac_diagonal_update_", N, bytes_each, a.device)
    with stream_of(a) as stream:
        cut = parts(a.device, -(-O // 128) * -(-I // 128), examples)
        out = torch.empty(cut, O, I, device=a.device)
        for n in range(0, N, examples):
            part = slice(n, n + examples)
            own = None if mask is None else mask[part]
            if U_A is None or U_G is None:
                x, d = rows_of(a[part], own, bias, dtype), rows_of(delta[part], own, False, dtype)
            else:
                x, d = project(a[part], U_A, own, bias, dtype), project(delta[part], U_G, own, False, dtype)
            _cuda.ekfac_diagonal_update(out, d, x, T == 1, terms(), stream)
            Lambda += out.sum(0)
