"""The last linear layer, to which representer points belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ihvp.model import InfluenceModel, Layer


def head_of(model: InfluenceModel) -> Layer:
    """The one tracked layer. Raises ValueError unless it is a single nn.Linear."""
    layers = list(model.layers.values())
    if len(layers) != 1 or len(layers[0].modules) != 1 or not isinstance(layers[0].modules[0], nn.Linear):
        names = ", ".join(f"{layer.name!r} ({type(layer.modules[0]).__name__})" for layer in layers)
        raise ValueError(
            f"model must track the last linear layer alone, by InfluenceModel(..., start_layer=-1); it tracks {names}"
        )
    return layers[0]


def largest_logit(outputs: Any, targets: Any) -> Tensor:
    """The predicted class's logit, (N,) or (N,T)."""
    if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 3):
        what = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TypeError(f"the net must return logits (N,C) or (N,T,C), got {what}; give a measurement")
    return torch.max(outputs, dim=-1).values
