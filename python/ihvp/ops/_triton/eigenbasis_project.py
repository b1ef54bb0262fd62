"""out[n,t] = U^T [x[n,t]; 1]: the bias row of U is where the sum begins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import (
    ACCURATE,
    Arithmetic,
    arithmetic,
    block,
    count,
    depth,
    flat_rows,
    launch,
    mask_bytes,
    warps,
)
from ihvp.ops._triton._tile import corner, load_tokens, real_rows


@triton.jit
def project_kernel(
    out_ptr,
    x_ptr,
    U_ptr,
    mask_ptr,
    positions,
    T,
    features,
    columns,
    width,
    stride_xn,
    stride_xt,
    stride_xi,
    stride_ui,
    stride_uj,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    m, j = corner(tl.program_id(0), tl.cdiv(width, BLOCK_J), BLOCK_T, BLOCK_J)
    real = real_rows(mask_ptr, m, positions)
    offsets = m // T * stride_xn + m % T * stride_xt
    acc = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    if BIAS:
        row = tl.load(U_ptr + features * stride_ui + j * stride_uj, mask=j < columns, other=0.0).to(tl.float32)
        acc += tl.where(real[:, None], row[None, :], 0.0)
    for start in range(0, features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I).to(tl.int64)
        x = load_tokens(x_ptr, offsets, real, i, features, stride_xi, False, DTYPE)
        U = load_tokens(U_ptr, i * stride_ui, i < features, j, columns, stride_uj, False, DTYPE)
        acc = tl.dot(x, U, acc, input_precision=PRECISION)
    at = out_ptr + m[:, None] * width + j[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m < positions)[:, None] & (j < width)[None, :])


def project(out: Tensor, x: Tensor, U: Tensor, mask: Tensor | None, bias: bool, how: Arithmetic) -> Tensor:
    """Into `out` (N,T,width), contiguous, of any type; zeros beyond the I' columns of U."""
    N, T, features = x.shape
    widest = how.limit(x, U)
    rows, columns = block(N * T, widest), block(out.shape[2], widest)
    launch(
        project_kernel,
        (count(N * T, rows) * count(out.shape[2], columns),),
        out,
        x,
        U,
        mask_bytes(mask),
        N * T,
        flat_rows(x)[0],
        features,
        U.shape[1],
        out.shape[2],
        *flat_rows(x)[1:],
        x.stride(2),
        *U.stride(),
        constants={**how.constants, "BIAS": bias, "BLOCK_T": rows, "BLOCK_J": columns, "BLOCK_I": depth(how)},
        warps=warps(rows, columns),
    )
    return out


def run(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1], U.shape[1], device=x.device)
    how = arithmetic(x, U)
    return project(out, x, U, mask, bias, ACCURATE if how.dtype == torch.float32 else how)
