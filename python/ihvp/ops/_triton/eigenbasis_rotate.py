"""out[q] = U_G^T (V[q] U_A), or back."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._planes import planes
from ihvp.ops._triton._product import left_times, rows_times


def run(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool) -> Tensor:
    Q, O, I = V.shape
    out = torch.empty(V.shape, device=V.device)
    if V.numel() == 0:
        return out
    right, left = (planes(U.unsqueeze(0), accurate=True) for U in (U_A, U_G))
    bytes_each = 8 * O * I
    chunk, _ = workspace("eigenbasis_rotate", Q, bytes_each, lambda q: V.new_empty(q * bytes_each, dtype=torch.uint8))
    for q in range(0, Q, chunk):
        part = slice(q, q + chunk)
        half = rows_times(planes(V[part], accurate=True), right, transposed=inverse)
        left_times(left, half, out[part], transposed=not inverse)
    return out
