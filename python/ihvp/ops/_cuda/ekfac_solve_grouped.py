"""One block a layer and query: the matrix stays in shared memory through all four products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._cuda._launch import stream_of, table

ENTRIES = 16  # of a layer's row: V, U_A, U_G, Lambda, out; O, I; strides 3, 2, 2, 2
WIDEST = 128  # what fits beside a streamed basis


def run(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    widest = max(max(x.shape[1:]) for x in V)
    if widest > WIDEST:
        raise ValueError(f"the CUDA kernel of ekfac_solve_grouped is for widths up to {WIDEST}, got {widest}")
    with stream_of(V[0]) as stream:
        out = [torch.empty(x.shape, device=x.device) for x in V]
        wide = [[x.float() for x in tensors] for tensors in (V, U_A, U_G, Lambda)]
        rows: list[int] = []
        for v, A, G, own, result in zip(*wide, out, strict=True):
            rows += (v.data_ptr(), A.data_ptr(), G.data_ptr(), own.data_ptr(), result.data_ptr())
            rows += (*v.shape[1:], *v.stride(), *A.stride(), *G.stride(), *own.stride())
        shifts = torch.tensor(damping, dtype=torch.float32).pin_memory().to(V[0].device, non_blocking=True)
        _cuda.ekfac_solve_grouped(table(rows, ENTRIES, V[0].device), shifts, V[0].shape[0], stream)
        return out
