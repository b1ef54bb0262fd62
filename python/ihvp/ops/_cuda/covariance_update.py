"""C += sum over positions x x^T: the upper triangle's tiles, float32 sums of 4,096 positions added in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._cuda._launch import affordable, padded, parts, rows_of, stream_of, terms

CHUNK = 4096  # positions summed in float32


def run(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    (N, T, _), d = x.shape, C.shape[0]
    if N * T * d == 0:
        return
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    side = -(-d // 128)
    examples = affordable("covariance_update_", N, T * padded(d) * dtype.itemsize, x.device)
    with stream_of(x) as stream:
        cut = parts(x.device, side * (side + 1) // 2, -(-min(N, examples) * T // CHUNK))
        out = torch.zeros(cut, d, d, dtype=torch.float64, device=x.device)
        for n in range(0, N, examples):
            part = slice(n, n + examples)
            rows = rows_of(x[part], None if mask is None else mask[part], bias, dtype)
            _cuda.covariance_update(out, rows.flatten(0, 1), CHUNK, terms(), stream)
        upper = out.sum(0)
        C += upper.triu() + upper.triu(1).T
