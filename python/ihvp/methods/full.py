"""Vectors of all tracked parameters at once, for curvatures that do not stop at a layer's border."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp.methods.base import Vectors
from ihvp.model import InfluenceModel


def flatten(V: Vectors) -> Tensor:
    """Layer name -> (Q,O,I') as (Q,p) in float64, layer after layer."""
    return torch.cat([v.double().flatten(1) for v in V.values()], dim=1)


def unflatten(model: InfluenceModel, flat: Tensor, dtype: torch.dtype) -> Vectors:
    """(Q,p) as layer name -> (Q,O,I')."""
    shapes = {name: layer.shape for name, layer in model.layers.items()}
    parts = flat.split([O * I for O, I in shapes.values()], dim=1)
    return {name: part.reshape(-1, *shape).to(dtype) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
