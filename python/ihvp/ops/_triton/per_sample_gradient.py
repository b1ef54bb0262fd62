"""g[n] = sum_t delta[n,t] a[n,t]^T, stored or summed: one program a tile of one example's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._rows import alike
from ihvp.ops._triton._launch import INTERPRETED, count, launch, tile_of_planes, warps
from ihvp.ops._triton._outer import outer_tile
from ihvp.ops._triton._planes import Planes, planes


@triton.jit
def gradient_kernel(
    out_ptr,
    D,
    D_low,
    X,
    X_low,
    scale_d_ptr,
    scale_x_ptr,
    weight_ptr,
    N,
    T,
    O,
    I,
    LOW: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    across = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * across
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column = tile // across * BLOCK_O, tile % across * BLOCK_I
    acc = outer_tile(D, D_low, X, X_low, n, 0, T, row, column, LOW, WIDEN, BLOCK_O, BLOCK_I, BLOCK_T)
    if scale_d_ptr is not None:
        acc *= tl.load(scale_d_ptr + n) * tl.load(scale_x_ptr + n)
    r, c = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    inside = (row + r < O)[:, None] & (column + c < I)[None, :]
    at = r[:, None] * I + c[None, :]
    if weight_ptr is None:
        out_ptr += (n.to(tl.int64) * O + row) * I + column
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        weight = tl.load(weight_ptr + row.to(tl.int64) * I + column + at, mask=inside, other=0.0)
        tl.store(out_ptr + tile.to(tl.int64) * N + n, tl.sum(tl.sum(acc * acc * weight, 1), 0))


def gradients(out: Tensor, a: Planes, delta: Planes) -> Tensor:
    """Into `out` (N,O,I'), contiguous, of any type."""
    return by_example(out, a, delta, None, *out.shape[1:])


def weighted_squares(a: Planes, delta: Planes, weight: Tensor) -> Tensor:
    """(N,): sum_oi weight[o,i] g_n[o,i]^2, weight (O,I') contiguous float32."""
    return by_example(None, a, delta, weight, *weight.shape).sum(0)


def by_example(out: Tensor | None, a: Planes, delta: Planes, weight: Tensor | None, O: int, I: int) -> Tensor:
    """(O,I') of each gradient into `out`; or with a weight their weighted sums of squares, (tiles,N)."""
    N, T, _ = a.high.shape
    rows, columns, step = tile_of_planes(a.high.device, O, I, T)
    tiles = count(O, rows) * count(I, columns)
    if out is None:
        out = torch.empty(tiles, N, device=a.high.device)
    launch(
        gradient_kernel,
        (N * tiles,),
        out,
        *delta.descriptors(step, rows),
        *a.descriptors(step, columns),
        delta.scale,
        a.scale,
        weight,
        N,
        T,
        O,
        I,
        constants={
            "LOW": a.low is not None,
            "WIDEN": INTERPRETED,
            "BLOCK_O": rows,
            "BLOCK_I": columns,
            "BLOCK_T": step,
        },
        warps=warps(rows, columns),
        stages=2,
    )
    return out


def run(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = torch.empty(a.shape[0], delta.shape[2], a.shape[2] + bias, device=a.device)
    if a.shape[1] == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    narrow = alike(a, delta)
    return gradients(out, planes(a, mask, bias, narrow=narrow), planes(delta, mask, narrow=narrow))
