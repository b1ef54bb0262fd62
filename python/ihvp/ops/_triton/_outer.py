"""sum_t delta[n,t] a[n,t]^T of planes, a tile at a time, and what is summed of it over examples or chunks of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._gpu import parts_of
from ihvp.ops._triton._launch import INTERPRETED, count, launch, tile_of_planes, warps
from ihvp.ops._triton._planes import Planes
from ihvp.ops._triton._product import fetch


@triton.jit
def outer_tile(
    D,
    D_low,
    X,
    X_low,
    n,
    first,
    T,
    o,
    i,
    LOW: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sum_t D[n,t,o] X[n,t,i] of the T rows from `first`; rows beyond the tensor are zeros."""
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for t in range(0, T, BLOCK_T):
        d = fetch(D, n, o, first + t, True, BLOCK_O, BLOCK_T, WIDEN)
        x = fetch(X, n, first + t, i, False, BLOCK_T, BLOCK_I, WIDEN)
        if LOW:
            d_low = fetch(D_low, n, o, first + t, True, BLOCK_O, BLOCK_T, WIDEN)
            x_low = fetch(X_low, n, first + t, i, False, BLOCK_T, BLOCK_I, WIDEN)
            acc = tl.dot(d_low, x, acc, input_precision="ieee")
            acc = tl.dot(d, x_low, acc, input_precision="ieee")
        acc = tl.dot(d, x, acc, input_precision="ieee")
    return acc


@triton.jit
def upper_tile(k):
    """(row, column) of tile k of the upper triangle, by columns: k = column (column + 1) / 2 + row."""
    column = ((tl.sqrt(8.0 * k + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > k, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= k, column + 1, column)
    return k - column * (column + 1) // 2, column


@triton.jit
def sums_kernel(
    out_ptr,
    D,
    D_low,
    X,
    X_low,
    scale_d_ptr,
    scale_x_ptr,
    items,
    T,
    O,
    I,
    per_part,
    TRIANGLE: tl.constexpr,
    SQUARE: tl.constexpr,
    LOW: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # SQUARE: items are examples of T rows; else they are chunks of T rows of one slice.
    if TRIANGLE:
        row, column = upper_tile(tl.program_id(0))
    else:
        across = tl.cdiv(I, BLOCK_I)
        row, column = tl.program_id(0) // across, tl.program_id(0) % across
    o, i = row * BLOCK_O, column * BLOCK_I
    part = tl.program_id(1)
    first = part * per_part
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for item in tl.range(first, tl.minimum(first + per_part, items), flatten=True):  # one pipeline through all items
        n, start = 0, item * T
        if SQUARE:
            n, start = item, 0
        acc = outer_tile(D, D_low, X, X_low, n, start, T, o, i, LOW, WIDEN, BLOCK_O, BLOCK_I, BLOCK_T)
        if SQUARE:
            if scale_d_ptr is not None:
                acc *= tl.load(scale_d_ptr + item) * tl.load(scale_x_ptr + item)
            total += acc * acc
        else:
            total += acc
    if not SQUARE:
        if scale_d_ptr is not None:
            total *= tl.load(scale_d_ptr) * tl.load(scale_x_ptr)
    out_ptr += (part.to(tl.int64) * O + o) * I + i
    r, c = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I)
    tl.store(out_ptr + r[:, None] * I + c[None, :], total, mask=(o + r < O)[:, None] & (i + c < I)[None, :])


@triton.jit
def add_kernel(
    out_ptr,
    parts_ptr,
    parts,
    O,
    I,
    stride_o,
    stride_i,
    TRIANGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out += the parts, in the order of the parts and in out's type; of a triangle the mirror image too."""
    if TRIANGLE:
        row, column = upper_tile(tl.program_id(0))
    else:
        across = tl.cdiv(I, BLOCK)
        row, column = tl.program_id(0) // across, tl.program_id(0) % across
    o = row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (o < O)[:, None] & (i < I)[None, :]
    at = o[:, None] * I + i[None, :]
    total = tl.zeros((BLOCK, BLOCK), out_ptr.dtype.element_ty)
    for _ in range(parts):
        total += tl.load(parts_ptr + at, mask=inside, other=0.0).to(total.dtype)
        parts_ptr += tl.cast(O, tl.int64) * I
    if TRIANGLE:
        if row == column:  # tensor cores do not promise a symmetric tile
            total = tl.where(o[:, None] <= i[None, :], total, tl.trans(total))
        else:
            mirror = out_ptr + i[:, None] * stride_o + o[None, :] * stride_i
            there = (i < I)[:, None] & (o < O)[None, :]
            tl.store(mirror, tl.load(mirror, mask=there, other=0.0) + tl.trans(total), mask=there)
    here = out_ptr + o[:, None] * stride_o + i[None, :] * stride_i
    tl.store(here, tl.load(here, mask=inside, other=0.0) + total, mask=inside)


def add_sums(out: Tensor, d: Planes, x: Planes, items: int, T: int, *, square: bool, triangle: bool) -> None:
    """out (O,I) += the sum over items of sum_t d x^T, or of its squares; with `triangle` of x with itself."""
    O, I = out.shape
    low = d.low is not None
    rows, columns, step = tile_of_planes(out.device, O, I, T)
    tiles = count(O, rows) * count(I, columns)
    if triangle:
        rows = columns = max(rows, columns)
        tiles = count(O, rows) * (count(O, rows) + 1) // 2
    parts = parts_of(out.device, tiles, items)
    per_part = count(items, parts)
    parts = count(items, per_part)
    made = torch.empty(parts, O, I, device=out.device)
    launch(
        sums_kernel,
        (tiles, parts),
        made,
        *d.descriptors(step, rows),
        *x.descriptors(step, columns),
        d.scale,
        x.scale,
        items,
        T,
        O,
        I,
        per_part,
        constants={
            "TRIANGLE": triangle,
            "SQUARE": square,
            "LOW": low,
            "WIDEN": INTERPRETED,
            "BLOCK_O": rows,
            "BLOCK_I": columns,
            "BLOCK_T": step,
        },
        warps=warps(rows, columns),
        stages=3 if low else 5,
    )
    edge = 32
    side = count(O, edge)
    launch(
        add_kernel,
        (side * (side + 1) // 2 if triangle else side * count(I, edge),),
        out,
        made,
        parts,
        O,
        I,
        *out.stride(),
        constants={"TRIANGLE": triangle, "BLOCK": edge},
        warps=4,
    )
