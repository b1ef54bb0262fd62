"""g[n] = sum_t delta[n,t] a[n,t]^T, stored or summed: one program a tile of one example's gradient."""

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
    weight_ptr,
    N,
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
    n, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    o, i = corner(tile, tl.cdiv(I, BLOCK_I), BLOCK_O, BLOCK_I)
    acc = gradient_tile(
        a_ptr,
        d_ptr,
        mask_ptr,
        n,
        T,
        o,
        i,
        features_a,
        features_d,
        stride_an,
        stride_at,
        stride_ai,
        stride_dn,
        stride_dt,
        stride_do,
        BIAS,
        DTYPE,
        PRECISION,
        BLOCK_O,
        BLOCK_I,
        BLOCK_T,
    )
    inside = (o < O)[:, None] & (i < I)[None, :]
    if weight_ptr is None:
        at = out_ptr + (n * O + o)[:, None] * I + i[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        weight = tl.load(weight_ptr + o[:, None] * I + i[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + tile.to(tl.int64) * N + n, tl.sum(tl.sum(acc * acc * weight, 1), 0))


def gradients(out: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """Into `out` (N,O,I'), contiguous, of any type."""
    return by_example(out, a, delta, None, mask, bias, *out.shape[1:])


def weighted_squares(a: Tensor, delta: Tensor, weight: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """(N,): sum_oi weight[o,i] g_n[o,i]^2, weight (O,I') contiguous float32."""
    return by_example(None, a, delta, weight, mask, bias, *weight.shape).sum(0)


def by_example(
    out: Tensor | None,
    a: Tensor,
    delta: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    bias: bool,
    O: int,
    I: int,
) -> Tensor:
    """(O,I') of each gradient into `out`; or with a weight their weighted sums of squares, (tiles,N)."""
    N, T, features = a.shape
    how = arithmetic(a, delta)
    widest = how.limit(a, delta)
    rows, columns = block(O, widest), block(I, widest)
    tiles = count(O, rows) * count(I, columns)
    if out is None:
        out = torch.empty(tiles, N, device=a.device)
    launch(
        gradient_kernel,
        (N * tiles,),
        out,
        a,
        delta,
        mask_bytes(mask),
        weight,
        N,
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
