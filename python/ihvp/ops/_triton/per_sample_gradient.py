"""g[n] = sum_t delta[n,t] a[n,t]^T."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import arithmetic, block, count, depth, launch, mask_bytes, warps
from ihvp.ops._triton._tile import corner, gradient_tile


@triton.jit
def gradient_kernel(
    out_ptr,
    a_ptr,
    d_ptr,
    mask_ptr,
    T,
    O,
    I,
    features_a,
    features_d,
    stride_an,
    stride_at,
    stride_ai,
    stride_dn,
    stride_dt,
    stride_do,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    o, i = corner(tl.program_id(0) % tiles, tl.cdiv(I, BLOCK_I), BLOCK_O, BLOCK_I)
    if mask_ptr is not None:
        mask_ptr += n * T
    acc = gradient_tile(
        a_ptr + n * stride_an,
        d_ptr + n * stride_dn,
        mask_ptr,
        T,
        o,
        i,
        features_d,
        features_a,
        stride_at,
        stride_ai,
        stride_dt,
        stride_do,
        BIAS,
        DTYPE,
        PRECISION,
        BLOCK_O,
        BLOCK_I,
        BLOCK_T,
    )
    at = out_ptr + (n * O + o)[:, None] * I + i[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])


def gradients(out: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """Into `out` (N,O,I'), contiguous, of any type."""
    N, T, features = a.shape
    _, O, I = out.shape
    how = arithmetic(a, delta)
    widest = how.limit(a, delta)
    rows, columns = block(O, widest), block(I, widest)
    launch(
        gradient_kernel,
        (N * count(O, rows) * count(I, columns),),
        out,
        a,
        delta,
        mask_bytes(mask),
        T,
        O,
        I,
        features,
        delta.shape[2],
        *a.stride(),
        *delta.stride(),
        constants={
            **how.constants,
            "BIAS": bias,
            "BLOCK_O": rows,
            "BLOCK_I": columns,
            "BLOCK_T": depth(how),
        },
        warps=warps(rows, columns),
    )
    return out


def run(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = torch.empty(a.shape[0], delta.shape[2], a.shape[2] + bias, device=a.device)
    return gradients(out, a, delta, mask, bias)
