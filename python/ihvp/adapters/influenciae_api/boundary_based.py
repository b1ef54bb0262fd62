"""`deel.influenciae.boundary_based`: distances to the decision boundary."""

from __future__ import annotations

from torch import nn

import ihvp
from ihvp.adapters.influenciae_api._results import SelfInfluence
from ihvp.adapters.influenciae_api.common import InfluenceModel


class SampleBoundaryCalculator(SelfInfluence):
    """Minus the distance of a sample to the decision boundary."""

    def __init__(self, model: nn.Module, step_nbr: int = 100, eps: float = 1e-6) -> None:
        self.native = ihvp.SampleBoundaryCalculator(InfluenceModel(model), steps=step_nbr, eps=eps)


class WeightsBoundaryCalculator(SelfInfluence):
    """Minus the distance of the weights to those that change a sample's class; of the linear layers."""

    def __init__(self, model: nn.Module, step_nbr: int = 100, norm_type: int = 2, eps: float = 1e-6) -> None:
        if norm_type != 2:
            raise ValueError(f"norm_type must be 2, got {norm_type}")
        self.native = ihvp.WeightsBoundaryCalculator(InfluenceModel(model, 0, -1), steps=step_nbr, eps=eps)
