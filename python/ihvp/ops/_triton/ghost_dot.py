"""S[m,n] = sum_st (delta1[m,s] . delta2[n,t]) (a1[m,s] . a2[n,t]): the tiles of two Gram matrices, multiplied."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import Arithmetic, arithmetic, count, depth, launch, mask_bytes, next_power_of_2, warps
from ihvp.ops._triton._tile import load_tokens, real_rows

EDGE = 64  # rows of positions a tile: two accumulators of it


@triton.jit
def gram_tile(
    x_ptr,
    y_ptr,
    at_x,
    at_y,
    real_x,
    real_y,
    features,
    stride_x,
    stride_y,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BIAS:
        acc += 1.0  # what is not real meets a zero of the other Gram matrix
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tokens(x_ptr, at_x, real_x, k, features, stride_x, False, DTYPE)
        y = load_tokens(y_ptr, at_y, real_y, k, features, stride_y, False, DTYPE)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION)
    return acc


@triton.jit
def ghost_kernel(
    out_ptr,
    a1_ptr,
    d1_ptr,
    a2_ptr,
    d2_ptr,
    mask1_ptr,
    mask2_ptr,
    M,
    N,
    T1,
    T2,
    I,
    O,
    stride_a1n,
    stride_a1t,
    stride_a1i,
    stride_d1n,
    stride_d1t,
    stride_d1o,
    stride_a2n,
    stride_a2t,
    stride_a2i,
    stride_d2n,
    stride_d2t,
    stride_d2o,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXAMPLES1: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EXAMPLES2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A tile's rows are EXAMPLES1 examples of BLOCK_S positions each, its columns likewise; NORM takes m = n alone.
    ROWS: tl.constexpr = EXAMPLES1 * BLOCK_S
    COLUMNS: tl.constexpr = EXAMPLES2 * BLOCK_T
    blocks = tl.cdiv(N, EXAMPLES2)
    first_m, first_n = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64)
    if not NORM:
        first_m, first_n = first_m // blocks, first_n % blocks
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m, n = first_m * EXAMPLES1 + row // BLOCK_S, first_n * EXAMPLES2 + column // BLOCK_T
    total = tl.zeros((EXAMPLES1, EXAMPLES2), tl.float32)
    for first_s in range(0, T1, BLOCK_S):
        s = first_s + (row % BLOCK_S).to(tl.int64)
        real1 = real_rows(mask1_ptr, m * T1 + s, M * T1) & (s < T1)
        start = 0
        if NORM:
            start = first_s  # the tiles below the diagonal are those above it
        for first_t in range(start, T2, BLOCK_T):
            t = first_t + (column % BLOCK_T).to(tl.int64)
            real2 = real_rows(mask2_ptr, n * T2 + t, N * T2) & (t < T2)
            d = gram_tile(
                d1_ptr,
                d2_ptr,
                m * stride_d1n + s * stride_d1t,
                n * stride_d2n + t * stride_d2t,
                real1,
                real2,
                O,
                stride_d1o,
                stride_d2o,
                False,
                DTYPE,
                PRECISION,
                ROWS,
                COLUMNS,
                BLOCK_K,
            )
            x = gram_tile(
                a1_ptr,
                a2_ptr,
                m * stride_a1n + s * stride_a1t,
                n * stride_a2n + t * stride_a2t,
                real1,
                real2,
                I,
                stride_a1i,
                stride_a2i,
                BIAS,
                DTYPE,
                PRECISION,
                ROWS,
                COLUMNS,
                BLOCK_K,
            )
            sums = tl.sum(tl.reshape(d * x, (EXAMPLES1, BLOCK_S, EXAMPLES2, BLOCK_T)), 3)
            if NORM:
                if first_t > first_s:
                    sums *= 2.0
            total += tl.sum(sums, 1)
    m = first_m * EXAMPLES1 + tl.arange(0, EXAMPLES1)
    n = first_n * EXAMPLES2 + tl.arange(0, EXAMPLES2)
    inside = (m < M)[:, None] & (n < N)[None, :]
    if NORM:
        tl.store(out_ptr + m[:, None] + 0 * n[None, :], total, mask=inside & (m[:, None] == n[None, :]))
    else:
        tl.store(out_ptr + m[:, None] * N + n[None, :], total, mask=inside)


def gram(
    out: Tensor,
    set1: tuple[Tensor, Tensor, Tensor | None],
    set2: tuple[Tensor, Tensor, Tensor | None],
    bias: bool,
    *,
    norm: bool,
) -> None:
    """Of two sets (a, delta, mask) into out (M,N); with `norm` of one set with itself, m = n alone, into out (N,)."""
    (a1, delta1, mask1), (a2, delta2, mask2) = set1, set2
    (M, T1, I), (N, T2, _), O = a1.shape, a2.shape, delta1.shape[2]
    how: Arithmetic = arithmetic(a1, delta1, a2, delta2)
    edge = 16 if norm and T1 <= 16 else EDGE
    positions1, positions2 = (min(edge, next_power_of_2(T)) for T in (T1, T2))
    examples1, examples2 = edge // positions1, edge // positions2
    launch(
        ghost_kernel,
        (count(M, examples1) * (1 if norm else count(N, examples2)),),
        out,
        a1,
        delta1,
        a2,
        delta2,
        mask_bytes(mask1),
        mask_bytes(mask2),
        M,
        N,
        T1,
        T2,
        I,
        O,
        *a1.stride(),
        *delta1.stride(),
        *a2.stride(),
        *delta2.stride(),
        constants={
            **how.constants,
            "BIAS": bias,
            "NORM": norm,
            "EXAMPLES1": examples1,
            "BLOCK_S": positions1,
            "EXAMPLES2": examples2,
            "BLOCK_T": positions2,
            "BLOCK_K": depth(how),
        },
        warps=warps(edge, edge),
    )


def run(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    out = torch.empty(a1.shape[0], a2.shape[0], device=a1.device)
    if a1.shape[1] * a2.shape[1] == 0:
        return out.zero_()
    gram(out, (a1, delta1, mask1), (a2, delta2, mask2), bias, norm=False)
    return out
