"""sum_oi (U_G^T g_n U_A)^2 / (Lambda + damping): the weighted sum of squares is the epilogue of an example's tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import arithmetic, block, count, depth, launch, mask_bytes, warps
from ihvp.ops._triton._projected import projected
from ihvp.ops._triton._tile import corner, gradient_tile
from ihvp.ops._triton.gradient_dot import row_dot


@triton.jit
def weighted_squares_kernel(
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
    inside = (o < O)[:, None] & (i < I)[None, :]
    weight = tl.load(weight_ptr + o[:, None] * I + i[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + tile.to(tl.int64) * N + n, tl.sum(tl.sum(acc * acc * weight, 1), 0))


def weighted_squares(a: Tensor, delta: Tensor, weight: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """(N,): sum_oi weight[o,i] g_n[o,i]^2, weight (O,I') contiguous float32."""
    (N, T, features), (O, I) = a.shape, weight.shape
    how = arithmetic(a, delta)
    widest = how.limit(a, delta)
    rows, columns = block(O, widest), block(I, widest)
    tiles = count(O, rows) * count(I, columns)
    parts = torch.empty(tiles, N, device=a.device)
    launch(
        weighted_squares_kernel,
        (N * tiles,),
        parts,
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
    return parts.sum(0)


def run(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
) -> Tensor:
    (N, T, _), (O, I) = a.shape, Lambda.shape
    if N * T * O * I == 0:
        return torch.zeros(N, device=a.device)
    weight = 1 / (Lambda.float().contiguous() + damping)
    if U_A is None or U_G is None:
        return influence(a, delta, weight, mask, bias)
    out = torch.empty(N, device=a.device)
    for part, x, d in projected("ekfac_self_influence", a, delta, U_A, U_G, mask, bias):
        out[part] = influence(x, d, weight, None, False)
    return out


def influence(a: Tensor, delta: Tensor, weight: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """At T = 1 the square of the product is the product of the squares, and the sum a row dot."""
    if a.shape[1] == 1:
        return row_dot(weight.unsqueeze(0), a, delta, mask, bias, squared=True)[0]
    return weighted_squares(a, delta, weight, mask, bias)
