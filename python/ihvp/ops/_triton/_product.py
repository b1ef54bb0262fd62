"""out[b] = A[b] B[b] of planes, each operand as it lies or transposed; what follows a product is its epilogue.

Epilogues: stored as it is; stored as planes of the next product; divided by (Lambda + damping); met with rows and
summed over the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._triton._launch import INTERPRETED, count, launch, tile_of_planes, warps
from ihvp.ops._triton._planes import TOP, Planes, empty_planes, flat, keep_largest, power_of_two, store_planes


@triton.jit
def fetch(x, b, row, column, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr):
    """The tile (ROWS, COLUMNS) of slice b at (row, column), of a descriptor of the tensor or of its transpose."""
    if TRANSPOSED:
        tile = tl.trans(x.load([b, column, row]).reshape(COLUMNS, ROWS))
    else:
        tile = x.load([b, row, column]).reshape(ROWS, COLUMNS)
    if WIDEN:  # the interpreter's numpy has no bfloat16
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def product_kernel(
    out_ptr,
    low_ptr,
    scale_ptr,
    A,
    A_low,
    B,
    B_low,
    scale_a_ptr,
    scale_b_ptr,
    Lambda_ptr,
    damping_ptr,
    largest_ptr,
    x_ptr,
    x_low_ptr,
    scale_x_ptr,
    batches,
    M,
    J,
    K,
    width,
    shift,
    dampings,
    step_a,
    step_b,
    rows_each,
    stride_lm,
    stride_lj,
    stride_x,
    EPILOGUE: tl.constexpr,
    LOW: tl.constexpr,
    MANY_SCALES: tl.constexpr,
    TRANSPOSED_A: tl.constexpr,
    TRANSPOSED_B: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(width, BLOCK_J)
    tiles = tl.cdiv(M, BLOCK_M) * across
    b = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row, column = tile // across * BLOCK_M, tile % across * BLOCK_J
    acc = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = fetch(A, b * step_a, row, k, TRANSPOSED_A, BLOCK_M, BLOCK_K, WIDEN)
        y = fetch(B, b * step_b, k, column, TRANSPOSED_B, BLOCK_K, BLOCK_J, WIDEN)
        if LOW:
            a_low = fetch(A_low, b * step_a, row, k, TRANSPOSED_A, BLOCK_M, BLOCK_K, WIDEN)
            y_low = fetch(B_low, b * step_b, k, column, TRANSPOSED_B, BLOCK_K, BLOCK_J, WIDEN)
            small = tl.dot(a_low, y, small, input_precision="ieee")
            small = tl.dot(a, y_low, small, input_precision="ieee")
        acc = tl.dot(a, y, acc, input_precision="ieee")
    if LOW:
        acc += small
    # Addresses of the tile's corner in 64 bits, within the tile in 32.
    r, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_J)
    m, batch = row + r, b.to(tl.int64)
    real = m < M
    inside = real[:, None] & (column + c < width)[None, :]
    at = r[:, None] * width + c[None, :]
    corner = (batch * M + row) * width + column
    scale = tl.full((BLOCK_M,) if MANY_SCALES else (1,), 1.0, tl.float32)
    if scale_a_ptr is not None:
        if MANY_SCALES:
            scale *= tl.load(scale_a_ptr + m // rows_each, mask=real, other=1.0)
        else:
            scale *= tl.load(scale_a_ptr + batch * step_a)
    if scale_b_ptr is not None:
        scale *= tl.load(scale_b_ptr + batch * step_b)
    if EPILOGUE == "store":
        tl.store(out_ptr + corner + at, (acc * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    elif EPILOGUE == "planes":
        if low_ptr is not None:
            low_ptr += corner
        store_planes(out_ptr + corner, low_ptr, at, acc * power_of_two(-shift), inside)
        if column == 0:
            first = (m % rows_each == 0) & real
            tl.store(scale_ptr + (batch * M + m) // rows_each, scale * power_of_two(shift), mask=first)
    elif EPILOGUE == "divide":
        acc *= scale[:, None]
        Lambda_ptr += row.to(tl.int64) * stride_lm + column.to(tl.int64) * stride_lj
        where = r[:, None] * stride_lm + c[None, :] * stride_lj
        out_ptr += corner
        for d in range(dampings):
            Lambda = tl.load(Lambda_ptr + where, mask=inside, other=1.0).to(tl.float32)
            divided = acc / (Lambda + tl.load(damping_ptr + d))
            tl.store(out_ptr + at, divided, mask=inside)
            keep_largest(largest_ptr + d * batches + batch, divided)  # beyond the edges are zeros
            out_ptr += batches * tl.cast(M, tl.int64) * width
    else:  # "rows"
        corner = row.to(tl.int64) * stride_x + column
        at = r.to(tl.int64)[:, None] * stride_x + c[None, :]
        x = tl.load(x_ptr + corner + at, mask=inside, other=0.0).to(tl.float32)
        if x_low_ptr is not None:
            x += tl.load(x_low_ptr + corner + at, mask=inside, other=0.0).to(tl.float32)
        if scale_x_ptr is not None:
            scale *= tl.load(scale_x_ptr + m // rows_each, mask=real, other=1.0)
        total = tl.sum(acc * x, 1) * scale
        part = (column // BLOCK_J).to(tl.int64)
        tl.store(out_ptr + (part * batches + batch) * M + m, total, mask=real)


def multiply(
    A: Planes,
    B: Planes,
    batches: int,
    size: tuple[int, int, int],
    width: int,
    out: Mapping[str, Any],
    epilogue: str,
    *,
    rows_each: int | None = None,
    transposed: tuple[bool, bool] = (False, False),
    more: Mapping[str, Any] | None = None,
) -> None:
    """Launch the kernel: `size` is (M,J,K), `width` the columns computed; A's rows have a scale every `rows_each`."""
    M, J, K = size
    low = A.low is not None and B.low is not None
    rows, columns, depth = tile_of_planes(A.high.device, M, width, K)
    if epilogue == "divide":
        columns = min(columns, 64)  # room for the addresses of Lambda and of what is stored
    more = more or {}
    descriptors = (
        *A.descriptors(*((depth, rows) if transposed[0] else (rows, depth))),
        *B.descriptors(*((columns, depth) if transposed[1] else (depth, columns))),
    )
    launch(
        product_kernel,
        (batches * count(M, rows) * count(width, columns),),
        out["out"],
        out.get("low"),
        out.get("scale"),
        *descriptors,
        A.scale,
        B.scale,
        *(more.get(name) for name in ("Lambda", "damping", "largest", "x", "x_low", "scale_x")),
        batches,
        M,
        J,
        K,
        width,
        TOP.value + max(K - 1, 1).bit_length(),
        more.get("dampings", 1),
        1 if A.high.shape[0] > 1 else 0,
        1 if B.high.shape[0] > 1 else 0,
        rows_each or M,
        *more.get("strides", (0, 0)),
        more.get("stride_x", 0),
        constants={
            "EPILOGUE": epilogue,
            "LOW": low,
            "MANY_SCALES": rows_each is not None,
            "TRANSPOSED_A": transposed[0],
            "TRANSPOSED_B": transposed[1],
            "WIDEN": INTERPRETED,
            "BLOCK_M": rows,
            "BLOCK_J": columns,
            "BLOCK_K": depth,
        },
        warps=warps(rows, columns),
        stages=3,
    )


def rows_times(x: Planes, U: Planes, out: Tensor | None = None, *, transposed: bool = False) -> Planes:
    """x[n] U, or x[n] U^T, of tokens or matrices (N,T,K): into `out` (N,T,width), contiguous, or as planes.

    Planes get their scale from a bound, K |x| |U|, so that no pass over the result is needed.
    """
    N, T, _ = x.high.shape
    K, J = U.high.shape[1:] if not transposed else (U.high.shape[2], U.high.shape[1])
    made = Planes(out) if out is not None else empty_planes(N, T, J, x.low is not None, x.high.device)
    target = {"out": made.high, "low": made.low, "scale": made.scale}
    epilogue = "store" if out is not None else "planes"
    multiply(
        flat(x),
        U,
        1,
        (N * T, J, K),
        made.high.shape[2],
        target,
        epilogue,
        rows_each=T,
        transposed=(False, transposed),
    )
    return made


def left_times(
    U: Planes,
    V: Planes,
    out: Tensor,
    *,
    transposed: bool,
    Lambda: Tensor | None = None,
    damping: Tensor | None = None,
    largest: Tensor | None = None,
) -> None:
    """U V[q], or U^T V[q], into `out` (Q,O,I); with a Lambda over (Lambda + damping[d]) into (D,Q,O,I).

    `largest` (D Q) gets the bits of the largest absolute values.
    """
    Q, O, I = out.shape[-3:]
    divide: dict[str, Any] = {}
    if Lambda is not None and damping is not None:
        own = Lambda.contiguous()  # 32 bits reach across a tile of it
        divide = {"Lambda": own, "damping": damping, "dampings": len(damping), "largest": largest}
        divide["strides"] = own.stride()
    multiply(
        U,
        V,
        Q,
        (O, I, O),
        I,
        {"out": out},
        "divide" if divide else "store",
        transposed=(transposed, False),
        more=divide,
    )


def row_dots(P: Planes, x: Planes, d: Planes) -> Tensor:
    """(Q,M): sum_oi d[m,o] P[q,o,i] x[m,i], of M = N T rows."""
    (Q, O, I), (N, T, _) = P.high.shape, x.high.shape
    width = min(I, x.high.shape[2])
    parts = count(width, tile_of_planes(x.high.device, N * T, width, O)[1])
    out = torch.empty(parts, Q, N * T, device=x.high.device)
    more = {"x": x.high, "x_low": x.low, "scale_x": x.scale, "stride_x": x.high.stride(1)}
    multiply(flat(d), P, Q, (N * T, I, O), width, {"out": out}, "rows", rows_each=T, more=more)
    return out[0] if parts == 1 else out.sum(0)
