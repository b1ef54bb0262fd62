"""What calculators answer, from what each of them says about one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.top_k import Order, TopK
from ihvp.model import InfluenceModel

SIGNS = {"proponent": 1.0, "loss_change": -1.0}

Q = TypeVar("Q")
"""Queries, made ready for scoring."""


class SelfInfluenceCalculator(ABC):
    """A value for each training example on its own.

    Args:
        model: the InfluenceModel.
        train_loader: training data, where a method is not given any.
    """

    def __init__(self, model: InfluenceModel, train_loader: Iterable[Any] | None = None) -> None:
        if not isinstance(model, InfluenceModel):
            raise TypeError(f"model must be an ihvp.InfluenceModel, got {type(model).__name__}")
        self.model = model
        self.train_loader = train_loader

    @abstractmethod
    def _self_values(self, batch: Batch, index: int) -> Tensor:
        """(B,) values of a batch's examples; `index` names the batch in errors."""

    def self_scores(self, train_loader: Iterable[Any] | None = None) -> Tensor:
        """(N,) values of each example on its own."""
        return torch.cat([values for _, values in self.compute_influence_values(train_loader)])

    def compute_influence_values(self, loader: Iterable[Any] | None = None) -> Iterator[tuple[Any, Tensor]]:
        """For each batch (batch, (B,) self-influence), computed as it is asked for."""
        for index, (raw, batch) in enumerate(self.model.passes(self._data(loader), "self-influence")):
            yield raw, self._self_values(batch, index)

    def compute_top_k_from_training_dataset(
        self, loader: Iterable[Any] | None = None, k: int = 5, order: Order = Order.DESCENDING
    ) -> tuple[Tensor, Tensor]:
        """(values (k,), indices (k,)) of the self-influence, best first."""
        best = TopK(k, order)
        for _, values in self.compute_influence_values(loader):
            best.add(values.unsqueeze(0))
        values, indices = best.result()
        return values[0], indices[0]

    def _data(self, loader: Iterable[Any] | None) -> Iterable[Any]:
        data = self.train_loader if loader is None else loader
        if data is None:
            raise ValueError("no training data: give a loader here or to the constructor")
        return data


class InfluenceCalculator(SelfInfluenceCalculator, Generic[Q]):
    """Scores of training examples for queries, beside the self-influence.

    With sign="proponent" a positive score means that the example helped the query; with sign="loss_change" every
    result is the negative. A subclass says, batch by batch, how queries are made ready, joined and scored; its own
    values have the sign "proponent".
    """

    def __init__(
        self, model: InfluenceModel, train_loader: Iterable[Any] | None = None, sign: str = "proponent"
    ) -> None:
        if sign not in SIGNS:
            raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
        super().__init__(model, train_loader)
        self.sign = sign

    @property
    def query_model(self) -> InfluenceModel:
        """The model at whose weights queries are taken."""
        return self.model

    @abstractmethod
    def _ready(self, batch: Batch, index: int) -> Q:
        """A batch of queries, made ready."""

    @abstractmethod
    def _joined(self, parts: Sequence[Q]) -> Q:
        """Batches of queries as one."""

    @abstractmethod
    def _scored(self, queries: Q, batch: Batch, index: int) -> Tensor:
        """(Q,B) scores of a training batch."""

    def scores(self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None) -> Tensor:
        """(Q,N) scores of all training examples for all queries: one pass over each."""
        queries = self._joined([own for _, own in self._queries(test_loader)])
        return torch.cat([scores for _, scores in self._blocks(queries, train_loader)], dim=1)

    def top_k(
        self,
        test_loader: Iterable[Any],
        train_loader: Iterable[Any] | None = None,
        k: int = 5,
        order: Order = Order.DESCENDING,
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """For each test batch (batch, values (B,k), indices (B,k)), best first; indices count the training data.

        One pass over the training data, which keeps k candidates a query: the whole (Q,N) never exists.
        """
        found = list(self._queries(test_loader))
        best = TopK(k, order)
        for _, scores in self._blocks(self._joined([own for _, own in found]), train_loader):
            best.add(scores)
        values, indices = best.result()
        sizes = [self.query_model.batch(raw).size for raw, _ in found]
        parts = zip(found, values.split(sizes), indices.split(sizes), strict=True)
        return iter([(raw, own_values, own_indices) for (raw, _), own_values, own_indices in parts])

    def estimate_influence_values_in_batches(
        self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None
    ) -> Iterator[tuple[Any, Iterator[tuple[Any, Tensor]]]]:
        """For each test batch (batch, iterator of (train batch, (B_test,B_train))), computed as it is asked for.

        The training data is passed over once for each test batch; `scores` and `top_k` pass over it once in all.
        """
        for raw, queries in self._queries(test_loader):
            yield raw, self._blocks(queries, train_loader)

    def compute_influence_values(self, loader: Iterable[Any] | None = None) -> Iterator[tuple[Any, Tensor]]:
        """For each batch (batch, (B,) self-influence), computed as it is asked for."""
        for raw, values in super().compute_influence_values(loader):
            yield raw, SIGNS[self.sign] * values

    def _queries(self, test_loader: Iterable[Any]) -> Iterator[tuple[Any, Q]]:
        for index, (raw, batch) in enumerate(self.query_model.passes(test_loader, "queries")):
            yield raw, self._ready(batch, index)

    def _blocks(self, queries: Q, train_loader: Iterable[Any] | None) -> Iterator[tuple[Any, Tensor]]:
        for index, (raw, batch) in enumerate(self.model.passes(self._data(train_loader), "scores")):
            yield raw, SIGNS[self.sign] * self._scored(queries, batch, index)
