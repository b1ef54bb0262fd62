"""S = sum_l <P_l, g_l>: one block a layer and example."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._cuda._launch import stream_of, table, terms


def run(P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], mask: Tensor | None, bias: bool) -> Tensor:
    (N, T, _), Q, layers = a[0].shape, P[0].shape[0], len(P)
    if a[0].dtype != delta[0].dtype:
        a, delta = [x.float() for x in a], [x.float() for x in delta]
    P = [x.float().contiguous() for x in P]
    rows = [
        (x.data_ptr(), y.data_ptr(), z.data_ptr(), *x.shape[1:], *x.stride(), *y.stride(), *z.stride())
        for x, y, z in zip(P, a, delta, strict=True)
    ]
    with stream_of(a[0]) as stream:
        out = torch.zeros(layers, Q, N, device=a[0].device)
        own = None if mask is None else mask.contiguous()
        _cuda.gradient_dot_grouped(out, table(rows, out.device), own, a[0], T, bias, terms(), stream)
        return out.sum(0)
