"""S[m,n] = sum_oi weight g_m g_n at T = 1: a row dot whose rows are products of two examples' factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._arguments import read_tokens
from ihvp.ops._gpu import workspace
from ihvp.ops._triton._planes import planes
from ihvp.ops._triton._product import row_dots


def run(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    (M, N), (O, I) = (a1.shape[0], a2.shape[0]), weight.shape
    out = torch.zeros(M, N, device=a1.device)
    if M * N * O * I == 0:
        return out
    own = planes(weight.unsqueeze(0))
    left, right = read_tokens(delta1, mask1, False, torch.float32), read_tokens(a1, mask1, bias, torch.float32)
    d, x = (read_tokens(y, mask2, b, torch.float32)[:, 0] for y, b in ((delta2, False), (a2, bias)))
    bytes_each = 12 * N * (O + I)
    chunk, _ = workspace("weighted_ghost_dot", M, bytes_each, lambda m: x.new_empty(m * bytes_each, dtype=torch.uint8))
    for m in range(0, M, chunk):
        part = slice(m, m + chunk)
        out[part] = row_dots(own, planes(right[part] * x), planes(left[part] * d))[0].view(-1, N)
    return out
