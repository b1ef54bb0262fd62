"""S[q,n] = sum_t (L_q^T delta[n,t])^T (R_q a[n,t]): two accumulators a tile, multiplied and summed over the rank."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._rows import flat_rows
from ihvp.ops._triton._launch import (
    arithmetic,
    block,
    count,
    depth,
    launch,
    mask_bytes,
    next_power_of_2,
    warps,
)
from ihvp.ops._triton._tile import load_tokens, real_rows


@triton.jit
def low_rank_kernel(
    out_ptr,
    L_ptr,
    R_ptr,
    a_ptr,
    d_ptr,
    mask_ptr,
    positions,
    T_a,
    T_d,
    Q,
    O,
    features,
    rank,
    stride_lq,
    stride_lo,
    stride_lr,
    stride_rq,
    stride_rr,
    stride_ri,
    stride_an,
    stride_at,
    stride_ai,
    stride_dn,
    stride_dt,
    stride_do,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The columns of a tile are BLOCK_Q queries of BLOCK_R directions each.
    query_blocks = tl.cdiv(Q, BLOCK_Q)
    m = (tl.program_id(0) // query_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_q = (tl.program_id(0) % query_blocks).to(tl.int64) * BLOCK_Q
    column = tl.arange(0, BLOCK_Q * BLOCK_R)
    q = first_q + column // BLOCK_R
    real = real_rows(mask_ptr, m, positions)
    at_a = m // T_a * stride_an + m % T_a * stride_at
    at_d = m // T_d * stride_dn + m % T_d * stride_dt
    score = tl.zeros((BLOCK_T, BLOCK_Q), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + (column % BLOCK_R).to(tl.int64)
        wanted = (q < Q) & (r < rank)
        u = tl.zeros((BLOCK_T, BLOCK_Q * BLOCK_R), tl.float32)
        for start in range(0, O, BLOCK_K):
            o = start + tl.arange(0, BLOCK_K).to(tl.int64)
            d = load_tokens(d_ptr, at_d, real, o, O, stride_do, False, DTYPE)
            at = L_ptr + (q * stride_lq + r * stride_lr)[None, :] + o[:, None] * stride_lo
            L = tl.load(at, mask=(o < O)[:, None] & wanted[None, :], other=0.0).to(DTYPE)
            u = tl.dot(d, L, u, input_precision=PRECISION)
        at_r = R_ptr + q * stride_rq + r * stride_rr
        v = tl.zeros((BLOCK_T, BLOCK_Q * BLOCK_R), tl.float32)
        if BIAS:
            row = tl.load(at_r + features * stride_ri, mask=wanted, other=0.0).to(tl.float32)
            v += tl.where(real[:, None], row[None, :], 0.0)
        for start in range(0, features, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K).to(tl.int64)
            x = load_tokens(a_ptr, at_a, real, i, features, stride_ai, False, DTYPE)
            at = at_r[None, :] + i[:, None] * stride_ri
            R = tl.load(at, mask=(i < features)[:, None] & wanted[None, :], other=0.0).to(DTYPE)
            v = tl.dot(x, R, v, input_precision=PRECISION)
        score += tl.sum(tl.reshape(u * v, (BLOCK_T, BLOCK_Q, BLOCK_R)), 2)
    queries = first_q + tl.arange(0, BLOCK_Q)
    at = out_ptr + queries[None, :] * positions + m[:, None]
    tl.store(at, score, mask=(m < positions)[:, None] & (queries < Q)[None, :])


def run(L: Tensor, R: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    (N, T, features), (Q, O, rank) = a.shape, L.shape
    if N * T * Q * rank == 0:
        return torch.zeros((Q, N, T) if per_token else (Q, N), device=a.device)
    how = arithmetic(L, R, a, delta)
    directions = block(rank, 64)
    queries = max(1, min(64 // directions, next_power_of_2(Q)))
    rows = block(N * T, 64)
    terms = torch.empty(Q, N, T, device=a.device)
    launch(
        low_rank_kernel,
        (count(N * T, rows) * count(Q, queries),),
        terms,
        L,
        R,
        a,
        delta,
        mask_bytes(mask),
        N * T,
        flat_rows(a)[0],
        flat_rows(delta)[0],
        Q,
        O,
        features,
        rank,
        *L.stride(),
        *R.stride(),
        *flat_rows(a)[1:],
        a.stride(2),
        *flat_rows(delta)[1:],
        delta.stride(2),
        constants={
            **how.constants,
            "BIAS": bias,
            "BLOCK_T": rows,
            "BLOCK_Q": queries,
            "BLOCK_R": directions,
            "BLOCK_K": depth(how),
        },
        warps=warps(rows, queries * directions),
    )
    return terms if per_token else terms.sum(2)
