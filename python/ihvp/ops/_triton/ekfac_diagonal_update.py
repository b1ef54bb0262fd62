"""Lambda += sum_n (U_G^T g_n U_A)^2: a tile of Lambda is two accumulators, and no gradient leaves it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import (
    arithmetic,
    block,
    count,
    depth,
    launch,
    mask_bytes,
    splits,
    warps,
    wide_arithmetic,
)
from ihvp.ops._triton._projected import projected
from ihvp.ops._triton._tile import corner, gradient_tile, load_tokens, real_rows

EXAMPLES = 4096  # squares summed in float32 before they are added to Lambda, which may be wider


@triton.jit
def squares_kernel(
    out_ptr,
    a_ptr,
    d_ptr,
    mask_ptr,
    N,
    T,
    O,
    I,
    features_a,
    features_d,
    per_split,
    stride_os,
    stride_oo,
    stride_oi,
    stride_an,
    stride_at,
    stride_ai,
    stride_dn,
    stride_dt,
    stride_do,
    BIAS: tl.constexpr,
    SINGLE: tl.constexpr,
    ADD: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    o, i = corner(tl.program_id(0), tl.cdiv(I, BLOCK_I), BLOCK_O, BLOCK_I)
    split = tl.program_id(1).to(tl.int64)
    first = split * per_split
    end = tl.minimum(first + per_split, N)
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if SINGLE:  # the square of a product is the product of the squares: one plain product over examples
        for start in range(first, end, BLOCK_T):
            n = start + tl.arange(0, BLOCK_T).to(tl.int64)
            real = real_rows(mask_ptr, n, end)
            x = load_tokens(a_ptr, n * stride_an, real, i, features_a, stride_ai, BIAS, DTYPE)
            d = load_tokens(d_ptr, n * stride_dn, real, o, features_d, stride_do, False, DTYPE)
            total = tl.dot(tl.trans(d * d), x * x, total, input_precision=PRECISION)
    else:
        for n in tl.range(first, end, flatten=True):  # one pipeline of loads through all examples
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
            total += acc * acc
    at = out_ptr + split * stride_os + o[:, None] * stride_oo + i[None, :] * stride_oi
    inside = (o < O)[:, None] & (i < I)[None, :]
    total = total.to(out_ptr.dtype.element_ty)
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


def add_squares(Lambda: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> None:
    """Lambda += sum_n g_n^2 for at most EXAMPLES examples a part."""
    N, T, features = a.shape
    O, I = Lambda.shape
    how = wide_arithmetic() if T == 1 else arithmetic(a, delta)  # squares of float16 underflow
    widest = how.limit(a, delta)
    rows, columns = block(O, widest), block(I, widest)
    step = depth(how)
    tiles = count(O, rows) * count(I, columns)
    parts = max(splits(a.device, tiles, N, step if T == 1 else 1), count(N, EXAMPLES))
    per_split = count(N, parts)
    parts = count(N, per_split)
    out = Lambda.unsqueeze(0) if parts == 1 else torch.empty(parts, O, I, device=a.device)
    launch(
        squares_kernel,
        (tiles, parts),
        out,
        a,
        delta,
        mask_bytes(mask),
        N,
        T,
        O,
        I,
        features,
        delta.shape[2],
        per_split,
        *out.stride(),
        *a.stride(),
        *delta.stride(),
        constants={
            **how.constants,
            "BIAS": bias,
            "SINGLE": T == 1,
            "ADD": parts == 1,
            "BLOCK_O": rows,
            "BLOCK_I": columns,
            "BLOCK_T": step,
        },
        warps=warps(rows, columns),
    )
    if parts > 1:
        Lambda += out.sum(0)


def run(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    N, T, _ = a.shape
    O, I = Lambda.shape
    if N * T * O * I == 0:
        return
    if U_A is None or U_G is None:
        for n in range(0, N, EXAMPLES):
            part = slice(n, n + EXAMPLES)
            add_squares(Lambda, a[part], delta[part], None if mask is None else mask[part], bias)
        return
    for _, x, d in projected("ekfac_diagonal_update_", a, delta, U_A, U_G, mask, bias):
        add_squares(Lambda, x, d, None, False)
