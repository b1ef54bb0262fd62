"""out[q] = U_G^T (V[q] U_A), or back; the second product may divide by (Lambda + damping) as it ends."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._launch import ACCURATE, block, count, depth, launch, warps
from ihvp.ops._triton._tile import corner, load_tokens
from ihvp.ops._triton.eigenbasis_project import project


@triton.jit
def rows_kernel(
    out_ptr,
    U_ptr,
    V_ptr,
    Lambda_ptr,
    damping_ptr,
    dampings,
    O,
    I,
    stride_up,
    stride_uo,
    stride_lo,
    stride_li,
    stride_d,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(O, BLOCK_O) * tl.cdiv(I, BLOCK_I)
    q = (tl.program_id(0) // tiles).to(tl.int64)
    o, i = corner(tl.program_id(0) % tiles, tl.cdiv(I, BLOCK_I), BLOCK_O, BLOCK_I)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, O, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        U = load_tokens(U_ptr, p * stride_up, p < O, o, O, stride_uo, False, DTYPE)
        V = load_tokens(V_ptr + q * O * I, p * I, p < O, i, I, 1, False, DTYPE)
        acc = tl.dot(tl.trans(U), V, acc, input_precision=PRECISION)
    at = out_ptr + (q * O + o)[:, None] * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    if Lambda_ptr is None:
        tl.store(at, acc, mask=inside)
    else:
        where = Lambda_ptr + o[:, None] * stride_lo + i[None, :] * stride_li
        Lambda = tl.load(where, mask=inside, other=1.0).to(tl.float32)
        for d in range(dampings):
            tl.store(at + d * stride_d, acc / (Lambda + tl.load(damping_ptr + d)), mask=inside)


def rotate_rows(out: Tensor, U: Tensor, V: Tensor, divide: tuple[Tensor, Tensor] | None = None) -> None:
    """out[q] = U^T V[q]; with `divide` = (Lambda, dampings (D,)) out[d,q] = U^T V[q] / (Lambda + dampings[d]).

    V (Q,O,I) and out[d] are contiguous float32.
    """
    Q, O, I = V.shape
    rows, columns = block(O, ACCURATE.limit(V)), block(I, ACCURATE.limit(V))
    Lambda, dampings = divide or (None, None)
    launch(
        rows_kernel,
        (Q * count(O, rows) * count(I, columns),),
        out,
        U,
        V,
        Lambda,
        dampings,
        1 if dampings is None else len(dampings),
        O,
        I,
        *U.stride(),
        *((0, 0) if Lambda is None else Lambda.stride()),
        0 if dampings is None else out.stride(0),
        constants={**ACCURATE.constants, "BLOCK_O": rows, "BLOCK_I": columns, "BLOCK_P": depth(ACCURATE)},
        warps=warps(rows, columns),
    )


def run(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool) -> Tensor:
    right, left = (U_A.T, U_G.T) if inverse else (U_A, U_G)
    out = torch.empty(V.shape, device=V.device)
    Q, O, I = V.shape
    if V.numel() == 0:
        return out
    chunk, half = workspace("eigenbasis_rotate", Q, 4 * O * I, lambda q: V.new_empty(q, O, I, dtype=torch.float32))
    for q in range(0, Q, chunk):
        part = V[q : q + chunk]
        rotate_rows(out[q : q + chunk], left, project(half[: len(part)], part, right, None, False, ACCURATE))
    return out
