"""Hugging Face's Conv1D, the linear layer of GPT-2: y = x W + b with W (I,O); as a matrix it is W^T."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ihvp.layers._layer_type import LayerType
from ihvp.layers.linear import tokens


def split(module: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
    return {"weight": matrix[..., :-1].mT, "bias": matrix[..., -1]}


def join(module: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([parameters["weight"].mT, parameters["bias"].unsqueeze(-1)], dim=-1)


GPT2_CONV1D = LayerType(
    module="transformers.pytorch_utils.Conv1D",  # known by its name: that library need not be there
    outputs=lambda module: cast(Tensor, module.weight).shape[1],
    inputs=lambda module: cast(Tensor, module.weight).shape[0],
    bias=lambda module: True,
    activation=tokens,
    output_gradient=tokens,
    split=split,
    join=join,
)
