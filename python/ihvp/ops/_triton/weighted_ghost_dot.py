"""S[m,n] = sum_oi weight g_m g_n at T = 1: a row dot whose queries are weight scaled by one example's factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._arguments import read_tokens
from ihvp.ops._triton.gradient_dot import row_dot


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
    M, N = a1.shape[0], a2.shape[0]
    if M * N * weight.numel() == 0:
        return torch.zeros(M, N, device=a1.device)
    left = read_tokens(delta1, mask1, False, torch.float32)[:, 0].contiguous()
    right = read_tokens(a1, mask1, bias, torch.float32)[:, 0].contiguous()
    return row_dot(weight.expand(M, -1, -1), a2, delta2, mask2, bias, left=left, right=right)
