"""One program a layer and query: four products of small matrices, one after the other, through its own scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._group import table
from ihvp.ops._triton._launch import ACCURATE, TYPES, block, depth, launch, warps
from ihvp.ops._triton._tile import corner, load_tokens
from ihvp.ops._triton.ekfac_solve import on_device

ENTRIES = 17  # of a layer's row: V, U_A, U_G, Lambda, out, scratch; O, I; strides 3, 2, 2, 2


@triton.jit
def product(
    out_ptr,
    x_ptr,
    y_ptr,
    rows,
    depth,
    columns,
    stride_xr,
    stride_xk,
    stride_yk,
    stride_yc,
    Lambda_ptr,
    stride_lr,
    stride_lc,
    damping,
    DIVIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = x y, contiguous; with DIVIDE over (Lambda + damping). Ends when the whole program may read it."""
    side = tl.cdiv(columns, BLOCK)
    for tile in range(0, tl.cdiv(rows, BLOCK) * side):
        r, c = corner(tile, side, BLOCK, BLOCK)
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, depth, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K).to(tl.int64)
            x = load_tokens(x_ptr, r * stride_xr, r < rows, k, depth, stride_xk, False, DTYPE)
            y = load_tokens(y_ptr, k * stride_yk, k < depth, c, columns, stride_yc, False, DTYPE)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        if DIVIDE:
            at = Lambda_ptr + r[:, None] * stride_lr + c[None, :] * stride_lc
            acc = acc / (tl.load(at, mask=inside, other=1.0).to(tl.float32) + damping)
        tl.store(out_ptr + r[:, None] * columns + c[None, :], acc, mask=inside)
    tl.debug_barrier()


@triton.jit
def solve_kernel(
    table_ptr,
    damping_ptr,
    ENTRIES: tl.constexpr,
    V_TYPE: tl.constexpr,
    A_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    L_TYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    q = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    row = table_ptr + layer * ENTRIES
    V = tl.load(row).to(tl.pointer_type(V_TYPE)) + q * tl.load(row + 8)
    A = tl.load(row + 1).to(tl.pointer_type(A_TYPE))
    G = tl.load(row + 2).to(tl.pointer_type(G_TYPE))
    L = tl.load(row + 3).to(tl.pointer_type(L_TYPE))
    O, I = tl.load(row + 6), tl.load(row + 7)
    out = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + q * O * I
    half = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + q * O * I
    vo, vi = tl.load(row + 9), tl.load(row + 10)
    ai, aj = tl.load(row + 11), tl.load(row + 12)
    go, gp = tl.load(row + 13), tl.load(row + 14)
    lo, li = tl.load(row + 15), tl.load(row + 16)
    damping = tl.load(damping_ptr + layer)
    product(half, V, A, O, I, I, vo, vi, ai, aj, L, lo, li, 0.0, False, DTYPE, PRECISION, BLOCK, BLOCK_K)
    product(out, G, half, O, O, I, gp, go, I, 1, L, lo, li, damping, True, DTYPE, PRECISION, BLOCK, BLOCK_K)
    product(half, out, A, O, I, I, I, 1, aj, ai, L, lo, li, 0.0, False, DTYPE, PRECISION, BLOCK, BLOCK_K)
    product(out, G, half, O, O, I, go, gp, I, 1, L, lo, li, 0.0, False, DTYPE, PRECISION, BLOCK, BLOCK_K)


def run(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    device, Q, layers = V[0].device, V[0].shape[0], len(V)
    out = [torch.empty(x.shape, device=device) for x in V]
    scratch = [torch.empty(x.shape, device=device) for x in V]
    rows: list[int] = []
    for v, A, G, own, result, space in zip(V, U_A, U_G, Lambda, out, scratch, strict=True):
        rows += (v.data_ptr(), A.data_ptr(), G.data_ptr(), own.data_ptr(), result.data_ptr(), space.data_ptr())
        rows += (*v.shape[1:], *v.stride(), *A.stride(), *G.stride(), *own.stride())
    edge = block(max(max(x.shape[1:]) for x in V), 64)
    launch(
        solve_kernel,
        (Q, layers),
        table(rows, ENTRIES, device),
        on_device(damping, device),
        constants={
            **ACCURATE.constants,
            "ENTRIES": ENTRIES,
            "V_TYPE": TYPES[V[0].dtype],
            "A_TYPE": TYPES[U_A[0].dtype],
            "G_TYPE": TYPES[U_G[0].dtype],
            "L_TYPE": TYPES[Lambda[0].dtype],
            "BLOCK": edge,
            "BLOCK_K": depth(ACCURATE),
        },
        warps=warps(edge, edge),
    )
    return out
