"""`deel.influenciae.rps`: representer points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import ihvp
from ihvp.adapters.influenciae_api._results import Influence
from ihvp.adapters.influenciae_api.common import IHVPFactory, InfluenceModel, Loss, built


class RepresenterPointL2(Influence):
    """The last linear layer of a net, refitted with `lambda_regularization ||W||^2` to the loss itself."""

    def __init__(
        self, model: nn.Module, train_set: Iterable[Any], loss_function: Loss, lambda_regularization: float
    ) -> None:
        own = InfluenceModel(model, loss_function=loss_function)
        self.native = ihvp.RepresenterPointL2(own, train_set, lambda_regularization)


class RepresenterPointLJE(Influence):
    """The last linear layer of the model's net, by one Newton step with the IHVP object that the factory builds."""

    def __init__(
        self,
        influence_model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator_factory: IHVPFactory | str = "exact",
    ) -> None:
        own = InfluenceModel(influence_model.net, loss_function=influence_model.loss_fn)
        own.process_batch = influence_model.process_batch
        self.native = ihvp.RepresenterPointLJE(own, dataset, built(ihvp_calculator_factory, own, dataset))
