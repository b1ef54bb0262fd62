"""TracIn: dot products of gradients, summed over checkpoints of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import InfluenceCalculator
from ihvp.calculators.checkpoints import Checkpoint, read_checkpoint, weights_of
from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.methods.identity import IdentityIHVP
from ihvp.methods.queries import Queries
from ihvp.model import InfluenceModel, LossFn

T = TypeVar("T")


class TracInCalculator(InfluenceCalculator[list[Queries]]):
    """TracInCP: the score of training example n for query q is sum_c lr_c g_q(theta_c)^T g_n(theta_c).

    Its last-layer fast form is the same on a model that tracks the last layer: `InfluenceModel(net, loss_fn,
    start_layer=-1)`. The user's net serves for all checkpoints and has its own weights back after each batch.

    Args:
        model: the InfluenceModel.
        train_loader: training data, where a method is not given any.
        checkpoints: each a state_dict of the net, a file that holds one, or a function that returns one, which is
            called for each batch. Files are mapped into memory once.
        learning_rates: one for all checkpoints, or one for each: the step size times the number of steps that the
            checkpoint stands for.
        sign: "proponent" (positive: the example's steps lowered the query's loss) or "loss_change".
        measurement: as for FirstOrderInfluenceCalculator.

    Raises:
        ValueError: no checkpoint, as many learning rates as not, or a checkpoint of another architecture.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), TracInCP.
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any] | None,
        checkpoints: Sequence[Checkpoint],
        learning_rates: float | Sequence[float] = 1.0,
        sign: str = "proponent",
        *,
        measurement: LossFn | None = None,
    ) -> None:
        super().__init__(model, train_loader, sign)
        rates = [learning_rates] * len(checkpoints) if isinstance(learning_rates, (int, float)) else learning_rates
        if len(checkpoints) == 0:
            raise ValueError("checkpoints must hold at least one, got none")
        if len(rates) != len(checkpoints):
            raise ValueError(
                f"learning_rates must be one number or one for each of {len(checkpoints)} checkpoints, got {len(rates)}"
            )
        self.learning_rates = [float(rate) for rate in rates]
        self._checkpoints: list[Checkpoint] = []
        for i, checkpoint in enumerate(checkpoints):
            state = read_checkpoint(model.net, checkpoint, f"checkpoint {i}")
            self._checkpoints.append(checkpoint if callable(checkpoint) else state)
        # Dot products of the gradients at the weights of the moment.
        self._dots = FirstOrderInfluenceCalculator(model, None, IdentityIHVP(model), measurement=measurement)

    def _at_checkpoints(self, f: Callable[[int], T]) -> list[T]:
        """f(i) with the weights of checkpoint i, for each of them."""
        results = []
        for i, checkpoint in enumerate(self._checkpoints):
            with weights_of(self.model.net, read_checkpoint(self.model.net, checkpoint, f"checkpoint {i}")):
                results.append(f(i))
        return results

    def _weighted(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([rate * part for rate, part in zip(self.learning_rates, parts, strict=True)]).sum(0)

    def _ready(self, batch: Batch, index: int) -> list[Queries]:
        return self._at_checkpoints(lambda i: self._dots._ready(batch, index))

    def _joined(self, parts: Sequence[list[Queries]]) -> list[Queries]:
        return [self._dots._joined(own) for own in zip(*parts, strict=True)]

    def _scored(self, queries: list[Queries], batch: Batch, index: int) -> Tensor:
        return self._weighted(self._at_checkpoints(lambda i: self._dots._scored(queries[i], batch, index)))

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        return self._weighted(self._at_checkpoints(lambda i: self._dots._self_values(batch, index)))
