"""S = sum_l <P_l, g_l>, query-first: one launch for all layers.

The wider side of a layer, inputs or outputs, is contracted with all queries at once, (positions, wide) by (wide,
queries x narrow); the narrow side's tokens meet the result in registers, and the positions of an example are summed.
With rank-8 adapters a tile is eight queries wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._group import table
from ihvp.ops._triton._launch import (
    TYPES,
    Arithmetic,
    arithmetic,
    count,
    depth,
    launch,
    mask_bytes,
    next_power_of_2,
)
from ihvp.ops._triton._tile import load_tokens, real_rows

ENTRIES = (
    16  # of a layer's row: P, wide, narrow tokens; sizes; features; strides of P by query, narrow, wide; of tokens
)
EDGE = 64  # rows and columns of a tile


@triton.jit
def grouped_kernel(
    out_ptr,
    table_ptr,
    mask_ptr,
    N,
    T,
    Q,
    query_blocks,
    ENTRIES: tl.constexpr,
    P_TYPE: tl.constexpr,
    TOKEN_TYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXAMPLES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A tile's rows are EXAMPLES examples of BLOCK_T positions, its columns BLOCK_Q queries of BLOCK_S narrow features.
    first_n = (tl.program_id(0) // query_blocks).to(tl.int64) * EXAMPLES
    first_q = (tl.program_id(0) % query_blocks).to(tl.int64) * BLOCK_Q
    layer = tl.program_id(1).to(tl.int64)
    entry = table_ptr + layer * ENTRIES
    P_ptr = tl.load(entry).to(tl.pointer_type(P_TYPE))
    wide_ptr = tl.load(entry + 1).to(tl.pointer_type(TOKEN_TYPE))
    narrow_ptr = tl.load(entry + 2).to(tl.pointer_type(TOKEN_TYPE))
    wide, narrow = tl.load(entry + 3), tl.load(entry + 4)
    wide_features, narrow_features = tl.load(entry + 5), tl.load(entry + 6)
    stride_pq, stride_ps, stride_pk = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    stride_wn, stride_wt, stride_wk = tl.load(entry + 10), tl.load(entry + 11), tl.load(entry + 12)
    stride_sn, stride_st, stride_ss = tl.load(entry + 13), tl.load(entry + 14), tl.load(entry + 15)
    row, column = tl.arange(0, EXAMPLES * BLOCK_T), tl.arange(0, BLOCK_Q * BLOCK_S)
    n = first_n + row // BLOCK_T
    q = first_q + column // BLOCK_S
    score = tl.zeros((EXAMPLES, BLOCK_Q), tl.float32)
    for first_t in range(0, T, BLOCK_T):
        t = first_t + row % BLOCK_T
        real = real_rows(mask_ptr, n * T + t, N * T) & (t < T)
        at_wide, at_narrow = n * stride_wn + t * stride_wt, n * stride_sn + t * stride_st
        for first_s in range(0, narrow, BLOCK_S):
            s = first_s + column % BLOCK_S
            wanted = (q < Q) & (s < narrow)
            at_P = P_ptr + q * stride_pq + s * stride_ps
            acc = tl.zeros((EXAMPLES * BLOCK_T, BLOCK_Q * BLOCK_S), tl.float32)
            for start in range(0, wide, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K).to(tl.int64)
                x = load_tokens(wide_ptr, at_wide, real, k, wide_features, stride_wk, True, DTYPE)
                inside = wanted[:, None] & (k < wide)[None, :]
                P = tl.load(at_P[:, None] + k[None, :] * stride_pk, mask=inside, other=0.0).to(DTYPE)
                acc = tl.dot(x, tl.trans(P), acc, input_precision=PRECISION)
            s = first_s + tl.arange(0, BLOCK_S).to(tl.int64)
            y = load_tokens(narrow_ptr, at_narrow, real, s, narrow_features, stride_ss, True, tl.float32)
            met = tl.reshape(acc, (EXAMPLES * BLOCK_T, BLOCK_Q, BLOCK_S)) * y[:, None, :]
            score += tl.sum(tl.reshape(tl.sum(met, 2), (EXAMPLES, BLOCK_T, BLOCK_Q)), 1)
    n = first_n + tl.arange(0, EXAMPLES)
    q = first_q + tl.arange(0, BLOCK_Q)
    at = out_ptr + (layer * Q + q)[None, :] * N + n[:, None]
    tl.store(at, score, mask=(n < N)[:, None] & (q < Q)[None, :])


def rows_of(P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor]) -> list[int]:
    """A row a layer; the features of a side are one less than its size where that is the bias."""
    rows: list[int] = []
    for own, x, d in zip(P, a, delta, strict=True):
        _, O, I = own.shape
        step_q, step_o, step_i = own.stride()
        if I >= O:
            sizes = (own.data_ptr(), x.data_ptr(), d.data_ptr(), I, O, x.shape[2], O, step_q, step_o, step_i)
            rows += (*sizes, *x.stride(), *d.stride())
        else:
            sizes = (own.data_ptr(), d.data_ptr(), x.data_ptr(), O, I, O, x.shape[2], step_q, step_i, step_o)
            rows += (*sizes, *d.stride(), *x.stride())
    return rows


def run(P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], mask: Tensor | None, bias: bool) -> Tensor:
    (N, T, _), Q, layers = a[0].shape, P[0].shape[0], len(P)
    out = torch.empty(layers, Q, N, device=a[0].device)
    if a[0].dtype != delta[0].dtype:
        a, delta = [x.float() for x in a], [x.float() for x in delta]
    how: Arithmetic = arithmetic(P[0], a[0])
    narrow = max(1, min(EDGE, next_power_of_2(max(min(x.shape[1:]) for x in P))))
    queries = max(1, min(EDGE // narrow, next_power_of_2(Q)), 16 // narrow)
    rows = EDGE // 2 if how.precision == "tf32x3" else EDGE  # three products need more registers
    positions = max(1, min(rows, next_power_of_2(T)))
    examples = rows // positions
    launch(
        grouped_kernel,
        (count(N, examples) * count(Q, queries), layers),
        out,
        table(rows_of(P, a, delta), ENTRIES, out.device),
        mask_bytes(mask),
        N,
        T,
        Q,
        count(Q, queries),
        constants={
            **how.constants,
            "ENTRIES": ENTRIES,
            "P_TYPE": TYPES[P[0].dtype],
            "TOKEN_TYPE": TYPES[a[0].dtype],
            "EXAMPLES": examples,
            "BLOCK_T": positions,
            "BLOCK_Q": queries,
            "BLOCK_S": narrow,
            "BLOCK_K": min(32, depth(how)),
        },
        warps=8,
    )
    return out.sum(0)
