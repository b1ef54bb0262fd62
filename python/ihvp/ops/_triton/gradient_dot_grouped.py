"""S = sum_l <P_l, g_l>: one program a layer and example makes that gradient's tiles and meets them with the queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._group import table
from ihvp.ops._triton._launch import TYPES, arithmetic, block, count, depth, launch, mask_bytes, next_power_of_2, warps
from ihvp.ops._triton._tile import corner, gradient_tile

ENTRIES = 14  # of a layer's row: P, a, delta; O, I; three strides of each
QUERIES = 64  # whose scores a program keeps


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
    A_TYPE: tl.constexpr,
    D_TYPE: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = (tl.program_id(0) // query_blocks).to(tl.int64)
    first_q = (tl.program_id(0) % query_blocks).to(tl.int64) * BLOCK_Q
    layer = tl.program_id(1).to(tl.int64)
    row = table_ptr + layer * ENTRIES
    P_ptr = tl.load(row).to(tl.pointer_type(P_TYPE))
    a_ptr = tl.load(row + 1).to(tl.pointer_type(A_TYPE))
    d_ptr = tl.load(row + 2).to(tl.pointer_type(D_TYPE))
    O, I = tl.load(row + 3), tl.load(row + 4)
    stride_pq, stride_po, stride_pi = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    features = I
    if BIAS:
        features = I - 1
    q = first_q + tl.arange(0, BLOCK_Q)
    scores = tl.zeros((BLOCK_Q,), tl.float32)
    tiles_i = tl.cdiv(I, BLOCK_I)
    for tile in range(0, tl.cdiv(O, BLOCK_O) * tiles_i):
        o, i = corner(tile, tiles_i, BLOCK_O, BLOCK_I)
        g = gradient_tile(
            a_ptr,
            d_ptr,
            mask_ptr,
            n,
            T,
            o,
            i,
            features,
            O,
            tl.load(row + 8),
            tl.load(row + 9),
            tl.load(row + 10),
            tl.load(row + 11),
            tl.load(row + 12),
            tl.load(row + 13),
            BIAS,
            DTYPE,
            PRECISION,
            BLOCK_O,
            BLOCK_I,
            BLOCK_T,
        )
        at = P_ptr + o[:, None] * stride_po + i[None, :] * stride_pi
        inside = (o < O)[:, None] & (i < I)[None, :]
        for k in range(0, tl.minimum(BLOCK_Q, Q - first_q)):
            P = tl.load(at + (first_q + k) * stride_pq, mask=inside, other=0.0).to(tl.float32)
            score = tl.sum(tl.sum(P * g, 1), 0)
            scores += tl.where(q == first_q + k, score, 0.0)
    tl.store(out_ptr + (layer * Q + q) * N + n, scores, mask=q < Q)


def run(P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], mask: Tensor | None, bias: bool) -> Tensor:
    (N, T, _), Q, layers = a[0].shape, P[0].shape[0], len(P)
    out = torch.empty(layers, Q, N, device=a[0].device)
    how = arithmetic(a[0], delta[0])
    widths = [
        (x.data_ptr(), y.data_ptr(), z.data_ptr(), *x.shape[1:], *x.stride(), *y.stride(), *z.stride())
        for x, y, z in zip(P, a, delta, strict=True)
    ]
    rows, columns = (block(max(x.shape[axis] for x in P), 64) for axis in (1, 2))
    queries = next_power_of_2(max(1, min(Q, QUERIES)))
    launch(
        grouped_kernel,
        (N * count(Q, queries), layers),
        out,
        table(widths, out.device),
        mask_bytes(mask),
        N,
        T,
        Q,
        count(Q, queries),
        constants={
            **how.constants,
            "ENTRIES": ENTRIES,
            "P_TYPE": TYPES[P[0].dtype],
            "A_TYPE": TYPES[a[0].dtype],
            "D_TYPE": TYPES[delta[0].dtype],
            "BIAS": bias,
            "BLOCK_Q": queries,
            "BLOCK_O": rows,
            "BLOCK_I": columns,
            "BLOCK_T": depth(how),
        },
        warps=warps(rows, columns),
    )
    return out.sum(0)
