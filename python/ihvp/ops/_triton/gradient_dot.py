"""S[q,n] = <P_q, g_n>: query-first with a row dot as the epilogue, or gradient-first through stored blocks of g.

The first costs 2 Q M p multiplications and stores nothing but scores; the second 2 (M + Q N) p and carries every g to
memory and back once. Which is less follows from their shapes: `query_first_pays`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ihvp.ops._gpu import processors, workspace
from ihvp.ops._rows import alike
from ihvp.ops._triton._launch import INTERPRETED, block, count, launch, wide_arithmetic
from ihvp.ops._triton._planes import Planes, planes
from ihvp.ops._triton._product import row_dots
from ihvp.ops._triton.per_sample_gradient import gradients

FEW = 64  # queries up to which the library's product of two flat, very long operands is slower than `dots`


@triton.jit
def dots_kernel(
    out_ptr,
    P_ptr,
    g_ptr,
    Q,
    N,
    p,
    splits,
    per_split,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # out[q,n,split] = sum of the split's k of P[q,k] g[n,k].
    split = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    P_ptr += split * per_split + q[:, None].to(tl.int64) * p + k[None, :]
    g_ptr += split * per_split + n[:, None].to(tl.int64) * p + k[None, :]
    end = tl.minimum(p - split * per_split, per_split)
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for start in range(0, end, BLOCK_K):
        inside = start + k < end
        P = tl.load(P_ptr + start, mask=(q < Q)[:, None] & inside[None, :], other=0.0)
        g = tl.load(g_ptr + start, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        if WIDEN:
            P, g = P.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(P, tl.trans(g), acc, input_precision=PRECISION)
    at = out_ptr + (q[:, None] * N + n[None, :]) * splits + split
    tl.store(at, acc, mask=(q < Q)[:, None] & (n < N)[None, :])


def dots(P: Tensor, g: Tensor) -> Tensor:
    """(Q,N) of P (Q,p) and g (N,p), contiguous and of one type."""
    (Q, p), N = P.shape, g.shape[0]
    if Q > FEW:
        return (P @ g.T).float()
    precision = wide_arithmetic().precision if P.dtype == torch.float32 else "ieee"
    rows, columns, step = block(Q, FEW), block(N, FEW), 32 if precision == "tf32x3" else 128
    across = count(N, columns)
    per_split = count(count(p, step), max(1, 2 * processors(P.device) // across)) * step
    splits = count(p, per_split)
    out = torch.empty(Q, N, splits, device=P.device)
    launch(
        dots_kernel,
        (splits, across),
        out,
        P,
        g,
        Q,
        N,
        p,
        splits,
        per_split,
        constants={
            "WIDEN": INTERPRETED,
            "PRECISION": precision,
            "BLOCK_Q": rows,
            "BLOCK_N": columns,
            "BLOCK_K": step,
        },
        warps=4,
        stages=4,
    )
    return out.sum(2)


def query_first_pays(Q: int, T: int) -> bool:
    """2 Q T multiplications a weight against 2 T + 2 Q, and g written and read: worth some 400 of them, as measured."""
    return T == 1 or Q * T <= T + Q + 200


def gradient_first(P: Tensor, a: Planes, delta: Planes, dtype: torch.dtype) -> Tensor:
    """Blocks of g, each met with all queries."""
    N, (Q, O, I) = a.high.shape[0], P.shape
    queries = P.to(dtype).reshape(Q, O * I)
    out = torch.empty(Q, N, device=P.device)
    chunk, g = workspace(
        "gradient_dot", N, O * I * dtype.itemsize, lambda n: torch.empty(n, O, I, dtype=dtype, device=P.device)
    )
    for n in range(0, N, chunk):
        part = slice(n, min(n + chunk, N))
        x, d, own = a[part], delta[part], g[: part.stop - n]
        if x.scale is None and dtype == x.high.dtype:  # a plain product of one type, and so the library's
            torch.bmm(d.high[..., :O].mT, x.high[..., :I], out=own)
        else:
            gradients(own, x, d)
        out[:, part] = dots(queries, own.flatten(1))
    return out


def run(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    (N, T, _), (Q, O, I) = a.shape, P.shape
    if N * T * Q * O * I == 0:
        return torch.zeros((Q, N, T) if per_token else (Q, N), device=a.device)
    if per_token or query_first_pays(Q, T):
        narrow = alike(P, a, delta)
        x, d = planes(a, mask, bias, narrow=narrow), planes(delta, mask, narrow=narrow)
        terms = row_dots(planes(P, narrow=narrow), x, d).view(Q, N, T)
        return terms if per_token else terms.sum(2)
    narrow = alike(a, delta)
    medium = torch.get_float32_matmul_precision() == "medium" and all(y.dtype == torch.bfloat16 for y in (P, a, delta))
    x, d = planes(a, mask, bias, narrow=narrow), planes(delta, mask, narrow=narrow)
    return gradient_first(P, x, d, torch.bfloat16 if medium else torch.float32)
