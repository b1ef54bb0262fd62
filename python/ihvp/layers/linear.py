"""nn.Linear with any leading dimensions: y = W x + b, g = sum_t delta [x; 1]^T."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ihvp.layers._layer_type import LayerType


def tokens(module: nn.Module, x: Tensor) -> Tensor:
    """(N, *, features) -> (N,T,features): every position between example and features is a token."""
    if x.dim() < 2:
        raise ValueError(f"expected (N, *, features), got {tuple(x.shape)}")
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def split(module: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    if module.bias is None:
        return {"weight": matrix}
    return {"weight": matrix[..., :-1], "bias": matrix[..., -1]}


def join(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    if module.bias is None:
        return parameters["weight"]
    return torch.cat([parameters["weight"], parameters["bias"].unsqueeze(-1)], dim=-1)


LINEAR = LayerType(
    module=nn.Linear,
    outputs=lambda module: cast(nn.Linear, module).weight.shape[0],
    inputs=lambda module: cast(nn.Linear, module).weight.shape[1],
    bias=lambda module: module.bias is not None,
    activation=tokens,
    output_gradient=tokens,
    split=split,
    join=join,
)
