"""S[q,n] = <P_q, g_n>: query-first with a row dot as the epilogue, or gradient-first through blocks of g.

The first costs 2 Q M p multiplications and stores nothing but scores; the second 2 (M + Q N) p, and its blocks of g
stay in the L2 cache. Which is less follows from their shapes: `query_first_pays`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._triton._planes import Planes, planes
from ihvp.ops._triton._product import row_dots
from ihvp.ops._triton._projected import alike
from ihvp.ops._triton.per_sample_gradient import gradients

BLOCK_BYTES = 16 << 20  # of g at a time: with the queries' rows beside them a third of an L2 cache


def query_first_pays(Q: int, T: int) -> bool:
    """2 Q T multiplications a weight against 2 T + 2 Q, and 8 bytes of g written and read: worth about 900 of them."""
    return T == 1 or Q * T <= T + Q + 450


def gradient_first(P: Tensor, a: Planes, delta: Planes, dtype: torch.dtype) -> Tensor:
    """Blocks of g, each met with all queries in one plain product of torch."""
    N, (Q, O, I) = a.high.shape[0], P.shape
    queries = P.to(dtype).reshape(Q, O * I)
    out = torch.empty(Q, N, device=P.device)
    chunk = max(1, min(N, BLOCK_BYTES // (O * I * dtype.itemsize)))
    g = torch.empty(chunk, O, I, dtype=dtype, device=P.device)
    for n in range(0, N, chunk):
        part = slice(n, min(n + chunk, N))
        own = gradients(g[: part.stop - n], a[part], delta[part])
        out[:, part] = queries @ own.flatten(1).T
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
