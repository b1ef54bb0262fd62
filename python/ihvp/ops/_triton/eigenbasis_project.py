"""out[n,t] = U^T [x[n,t]; 1]: the bias row of U meets a column of ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.ops._rows import alike
from ihvp.ops._triton._planes import planes
from ihvp.ops._triton._product import rows_times


def run(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = torch.empty(x.shape[0], x.shape[1], U.shape[1], device=x.device)
    if U.shape[0] == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    narrow = alike(x, U)
    rows_times(planes(x, mask, bias, narrow=narrow), planes(U.unsqueeze(0), narrow=narrow), out)
    return out
