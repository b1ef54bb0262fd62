"""C += sum over positions x x^T: the tiles on and above the diagonal, mirrored as they are added."""

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
    flat_rows,
    launch,
    mask_bytes,
    splits,
    vectorised,
    warps,
)
from ihvp.ops._triton._tile import load_tokens, real_rows

CHUNK = 4096  # positions summed in float32 before they are added to C, which may be wider


@triton.jit
def covariance_kernel(
    C_ptr,
    x_ptr,
    mask_ptr,
    positions,
    T,
    d,
    features,
    per_split,
    stride_cs,
    stride_ci,
    stride_cj,
    stride_xn,
    stride_xt,
    stride_xi,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Tile k of the upper triangle, by columns: k = column (column + 1) / 2 + row.
    k = tl.program_id(0)
    column = ((tl.sqrt(8.0 * k + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > k, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= k, column + 1, column)
    row = k - column * (column + 1) // 2
    i = row.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    j = column.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    C_ptr += split * stride_cs
    end = tl.minimum(positions, (split + 1) * per_split)
    for first in range(split * per_split, end, CHUNK):
        acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
        for start in range(first, tl.minimum(first + CHUNK, end), BLOCK_T):
            m = start + tl.arange(0, BLOCK_T).to(tl.int64)
            real = real_rows(mask_ptr, m, end)
            offsets = m // T * stride_xn + m % T * stride_xt
            x_i = load_tokens(x_ptr, offsets, real, i, features, stride_xi, BIAS, DTYPE)
            x_j = load_tokens(x_ptr, offsets, real, j, features, stride_xi, BIAS, DTYPE)
            acc = tl.dot(tl.trans(x_i), x_j, acc, input_precision=PRECISION)
        inside_i, inside_j = i < d, j < d
        if row == column:  # tensor cores do not promise a symmetric tile
            acc = tl.where(i[:, None] <= j[None, :], acc, tl.trans(acc))
        inside = inside_i[:, None] & inside_j[None, :]
        at = C_ptr + i[:, None] * stride_ci + j[None, :] * stride_cj
        tl.store(at, tl.load(at, mask=inside, other=0.0) + acc.to(C_ptr.dtype.element_ty), mask=inside)
        if row != column:
            acc = tl.trans(acc)
            inside = inside_j[:, None] & inside_i[None, :]
            at = C_ptr + j[:, None] * stride_ci + i[None, :] * stride_cj
            tl.store(at, tl.load(at, mask=inside, other=0.0) + acc.to(C_ptr.dtype.element_ty), mask=inside)


def run(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    N, T, features = x.shape
    d, positions = C.shape[0], N * T
    if d == 0 or positions == 0:
        return
    how = arithmetic(x)
    narrow = how.precision == "tf32x3" and not vectorised(x)  # addresses and three products: beyond the registers
    edge = block(d, 32 if narrow else how.limit(x))
    side = count(d, edge)
    tiles = side * (side + 1) // 2
    parts = splits(x.device, tiles, positions, CHUNK)
    per_split = count(count(positions, parts), CHUNK) * CHUNK
    parts = count(positions, per_split)
    out = C.unsqueeze(0) if parts == 1 else torch.zeros(parts, d, d, dtype=C.dtype, device=C.device)
    launch(
        covariance_kernel,
        (tiles, parts),
        out,
        x,
        mask_bytes(mask),
        positions,
        flat_rows(x)[0],
        d,
        features,
        per_split,
        *out.stride(),
        *flat_rows(x)[1:],
        x.stride(2),
        constants={**how.constants, "BIAS": bias, "CHUNK": CHUNK, "BLOCK_D": edge, "BLOCK_T": depth(how)},
        warps=warps(edge, edge),
    )
    if parts > 1:
        C += out.sum(0)
