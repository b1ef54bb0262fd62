"""C += sum over positions x x^T of 16-bit tokens: tiles of the upper triangle by Hopper's tensor cores, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._cuda._launch import rows_of, stream_of
from ihvp.ops._gpu import parts_of, workspace

CHUNK = 512  # positions summed by the tensor cores, which truncate, before a float32 sum takes them
MOST = 32 * 16 * CHUNK  # positions summed in float32 before C takes them


def run(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    (N, T, features), d = x.shape, C.shape[0]
    if N * T * d == 0:
        return
    out = C if C.is_contiguous() else torch.zeros(d, d, dtype=C.dtype, device=C.device)
    side = -(-d // 128)
    bytes_each = T * (features + 16) * x.element_size()
    examples = workspace("covariance_update_", N, bytes_each, lambda n: x.new_empty(n * bytes_each, dtype=torch.uint8))[
        0
    ]
    examples = N if mask is None and not bias else examples
    with stream_of(x) as stream:
        for n in range(0, N, examples):
            part = slice(n, n + examples)
            rows = rows_of(x[part], None if mask is None else mask[part], bias)
            rows = rows.flatten(0, 1).unsqueeze(0)
            for first in range(0, rows.shape[1], MOST):
                own = rows[:, first : first + MOST]
                cut = parts_of(x.device, side * (side + 1) // 2, -(-own.shape[1] // CHUNK))
                parts = torch.empty(cut, d, d, device=x.device)
                _cuda.covariance_update(out, parts, own, CHUNK, stream)
    if out is not C:
        C += out
