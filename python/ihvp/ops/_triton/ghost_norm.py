"""||g_n||^2 = sum_st (delta[n,s] . delta[n,t]) (a[n,s] . a[n,t]): the diagonal of `ghost_dot`, half of its tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._triton.ghost_dot import gram


def run(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = torch.empty(a.shape[0], device=a.device)
    if a.shape[1] == 0:
        return out.zero_()
    gram(out, (a, delta, mask), (a, delta, mask), bias, norm=True)
    return out
