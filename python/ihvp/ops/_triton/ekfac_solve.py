"""Four products; the second divides by (Lambda + damping) as it ends, once for each damping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp.ops._gpu import workspace
from ihvp.ops._triton._planes import planes
from ihvp.ops._triton._product import left_times, rows_times


def on_device(damping: Sequence[float], device: torch.device) -> Tensor:
    """In float32: filled, or copied from pinned memory. The stream is not waited for."""
    if len(set(damping)) == 1:
        return torch.full((len(damping),), damping[0], device=device)
    host = torch.tensor(damping, dtype=torch.float32)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def run(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float]) -> Tensor:
    D, (Q, O, I) = len(damping), V.shape
    out = torch.empty(D, Q, O, I, device=V.device)
    if out.numel() == 0:
        return out
    shifts = on_device(damping, V.device)
    right, left = (planes(U.unsqueeze(0), accurate=True) for U in (U_A, U_G))
    bytes_each = 4 * O * I * (D + 3)
    chunk, _ = workspace("ekfac_solve", Q, bytes_each, lambda q: V.new_empty(q * bytes_each, dtype=torch.uint8))
    for q in range(0, Q, chunk):
        part = slice(q, q + chunk)
        half = rows_times(planes(V[part], accurate=True), right)
        size = half.high.shape[0]
        divided = torch.empty(D, size, O, I, device=V.device)
        largest = torch.zeros(D, size, dtype=torch.int32, device=V.device)
        left_times(left, half, divided, transposed=True, Lambda=Lambda, damping=shifts, largest=largest)
        for d in range(D):
            half = rows_times(planes(divided[d], accurate=True, largest=largest[d]), right, transposed=True)
            left_times(left, half, out[d, part], transposed=False)
    return out
