"""The net at displaced weights, as a function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.model import InfluenceModel


def displaced(model: InfluenceModel, step: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tracked parameters plus layer name -> (O,I'), by their names in the net."""
    own = {key: p.detach() for key, p in model.weights.items()}
    return {key: own[key] + part.to(own[key].dtype) for key, part in model.split(step).items()}


def call(model: InfluenceModel, batch: Batch, weights: dict[str, Tensor]) -> Any:
    """The net's outputs with these weights in the place of its own."""
    return torch.func.functional_call(model.net, weights, batch.args, dict(batch.kwargs))
