"""Representer points by local Jacobian expansion: one Newton step of the last layer as a sum over the examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import InfluenceCalculator
from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.calculators.head import head_of, largest_logit
from ihvp.methods.base import IHVP, gradients
from ihvp.methods.queries import Queries
from ihvp.model import InfluenceModel, LossFn


class RepresenterPointLJE(InfluenceCalculator[tuple[Queries, Tensor]]):
    """RPS-LJE. Near the net's last layer W (O,I') the stationary point of the mean loss is

        W - H^-1 (1/N) sum_n g_n  =  sum_n (W - H^-1 g_n) / N,   H = F + damping I,

    without a fit. The score of training example n for query q is its part <d m_q / dW, W - H^-1 g_n> / N of q's
    measurement m, by default of the predicted class's logit. The scores of a query sum to that logit after the Newton
    step. With sign="proponent" a higher score raises it. All examples share the part <d m_q / dW, W> / N. The
    self-influence is |<d m_n / dW, H^-1 g_n>| / N: how far the example alone moves its own logit.

    Args:
        model: an InfluenceModel that tracks the net's last layer alone, an nn.Linear.
        train_loader: all training data; fits the curvature if it is not fitted, and gives N.
        curvature: an IHVP object of the same model.
        sign: "proponent" or "loss_change".
        measurement: (outputs, targets) -> (N,) or (N,T).

    Source: Sui et al. 2021, Representer Point Selection via Local Jacobian Expansion for Post-hoc Classifier
    Explanation of Deep Neural Networks and Ensemble Models (NeurIPS), expanded at the net's own weights.
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any],
        curvature: IHVP,
        sign: str = "proponent",
        *,
        measurement: LossFn = largest_logit,
    ) -> None:
        super().__init__(model, train_loader, sign)
        head = head_of(model)
        self.measurement = measurement
        self._first = FirstOrderInfluenceCalculator(model, train_loader, curvature, measurement=measurement)
        self._W = {head.name: head.matrix()}
        self._N = sum(model.batch(raw).size for raw, _ in model.passes(train_loader, "training examples"))

    def _ready(self, batch: Batch, index: int) -> tuple[Queries, Tensor]:
        V = gradients(self.model, batch, index=index, measurement=self.measurement)
        shared = torch.stack([(v * self._W[name]).sum((1, 2)) for name, v in V.items()]).sum(0)
        return self._first._ready(batch, index), shared

    def _joined(self, parts: Sequence[tuple[Queries, Tensor]]) -> tuple[Queries, Tensor]:
        queries, shared = zip(*parts, strict=True)
        return self._first._joined(queries), torch.cat(shared)

    def _scored(self, queries: tuple[Queries, Tensor], batch: Batch, index: int) -> Tensor:
        own, shared = queries
        return (shared.unsqueeze(1) - self._first._scored(own, batch, index)) / self._N

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        V = gradients(self.model, batch, index=index, measurement=self.measurement)
        P = self._first.curvature.solve(gradients(self.model, batch, index=index))
        return torch.stack([(V[name] * P[name]).sum((1, 2)) for name in V]).sum(0).abs() / self._N
