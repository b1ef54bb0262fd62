"""S[q,n] = <P_q, g_n>: query-first with a row dot as the epilogue, or gradient-first through blocks of g.

The first costs 2 Q M p multiplications and stores nothing but scores; the second 2 (M + Q N) p and carries every g to
memory and back once. Which is less follows from their shapes: `query_first_pays`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._launch import (
    arithmetic,
    block,
    count,
    depth,
    flat_rows,
    launch,
    mask_bytes,
    splits,
    warps,
    wide_arithmetic,
)
from ihvp.ops._triton._projected import projected_dtype
from ihvp.ops._triton._tile import load_tokens, real_rows
from ihvp.ops._triton.per_sample_gradient import gradients


@triton.jit
def row_dot_kernel(
    out_ptr,
    P_ptr,
    a_ptr,
    d_ptr,
    mask_ptr,
    left_ptr,
    right_ptr,
    positions,
    T_a,
    T_d,
    Q,
    O,
    I,
    features,
    per_split,
    stride_pq,
    stride_po,
    stride_pi,
    stride_an,
    stride_at,
    stride_ai,
    stride_dn,
    stride_dt,
    stride_do,
    BIAS: tl.constexpr,
    SQUARE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    # out[split,q,m] = sum_oi d[m,o] left[q,o] P[q,o,i] right[q,i] x[m,i], of the split's columns i.
    row_blocks = tl.cdiv(positions, BLOCK_T)
    q = (tl.program_id(0) // row_blocks).to(tl.int64)
    m = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1).to(tl.int64)
    real = real_rows(mask_ptr, m, positions)
    at_a = m // T_a * stride_an + m % T_a * stride_at
    at_d = m // T_d * stride_dn + m % T_d * stride_dt
    score = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, I), BLOCK_I):
        i = first + tl.arange(0, BLOCK_I).to(tl.int64)
        acc = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        for start in range(0, O, BLOCK_O):
            o = start + tl.arange(0, BLOCK_O).to(tl.int64)
            d = load_tokens(d_ptr, at_d, real, o, O, stride_do, False, DTYPE)
            if SQUARE:
                d = d * d
            if left_ptr is not None:
                d = d * tl.load(left_ptr + q * O + o, mask=o < O, other=0.0).to(DTYPE)[None, :]
            P = load_tokens(P_ptr + q * stride_pq, o * stride_po, o < O, i, I, stride_pi, False, DTYPE)
            acc = tl.dot(d, P, acc, input_precision=PRECISION)
        x = load_tokens(a_ptr, at_a, real, i, features, stride_ai, BIAS, tl.float32)
        if SQUARE:
            x = x * x
        if right_ptr is not None:
            x = x * tl.load(right_ptr + q * I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
        score += tl.sum(acc * x, 1)
    tl.store(out_ptr + (split * Q + q) * positions + m, score, mask=m < positions)


def row_dot(
    P: Tensor,
    a: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    bias: bool,
    *,
    squared: bool = False,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """(Q,M): sum_oi delta[m,o] left[q,o] P[q,o,i] right[q,i] a[m,i], or of the squares of delta and a.

    `left` (Q,O) and `right` (Q,I') are contiguous; both or none.
    """
    (N, T, features), (Q, O, I) = a.shape, P.shape
    positions = N * T
    how = arithmetic(P, delta) if left is None and not squared else wide_arithmetic()
    widest = how.limit(P, a, delta)
    rows, columns = block(positions, widest), block(I, widest)
    row_blocks = count(positions, rows)
    parts = splits(a.device, Q * row_blocks, count(I, columns), 1)
    per_split = count(count(I, columns), parts) * columns
    parts = max(1, count(I, per_split))
    out = torch.empty(parts, Q, positions, device=a.device)
    launch(
        row_dot_kernel,
        (Q * row_blocks, parts),
        out,
        P,
        a,
        delta,
        mask_bytes(mask),
        left,
        right,
        positions,
        flat_rows(a)[0],
        flat_rows(delta)[0],
        Q,
        O,
        I,
        features,
        per_split,
        *P.stride(),
        *flat_rows(a)[1:],
        a.stride(2),
        *flat_rows(delta)[1:],
        delta.stride(2),
        constants={
            **how.constants,
            "BIAS": bias,
            "SQUARE": squared,
            "BLOCK_T": rows,
            "BLOCK_O": depth(how),
            "BLOCK_I": columns,
        },
        warps=warps(rows, columns),
    )
    return out[0] if parts == 1 else out.sum(0)


def query_first_pays(Q: int, T: int) -> bool:
    """2 Q T multiplications a weight against 2 T + 2 Q, and 8 bytes of g written and read: worth about 900 of them."""
    return T == 1 or Q * T <= T + Q + 450


def gradient_first(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """Blocks of g, each met with all queries in one plain product of torch."""
    N, (Q, O, I) = a.shape[0], P.shape
    dtype = projected_dtype(P, a, delta)
    queries = P.to(dtype).reshape(Q, O * I)
    out = torch.empty(Q, N, device=a.device)
    chunk, g = workspace(
        "gradient_dot", N, O * I * dtype.itemsize, lambda n: torch.empty(n, O, I, dtype=dtype, device=a.device)
    )
    for n in range(0, N, chunk):
        part = slice(n, n + chunk)
        own = gradients(g[: len(a[part])], a[part], delta[part], None if mask is None else mask[part], bias)
        out[:, part] = queries @ own.flatten(1).T
    return out


def run(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    (N, T, _), (Q, O, I) = a.shape, P.shape
    if N * T * Q * O * I == 0:
        return torch.zeros((Q, N, T) if per_token else (Q, N), device=a.device)
    if per_token or query_first_pays(Q, T):
        terms = row_dot(P, a, delta, mask, bias).view(Q, N, T)
        return terms if per_token else terms.sum(2)
    return gradient_first(P, a, delta, mask, bias)
