"""The shapes in which Influenciae's calculators give what a native calculator finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import ihvp


class SelfInfluence:
    """Values of training examples on their own, in Influenciae's shapes."""

    native: Any

    def compute_influence_values(self, train_set: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """(batch, (B,1)) for each batch."""
        for raw, values in self.native.compute_influence_values(train_set):
            yield raw, values.unsqueeze(1)

    def compute_top_k_from_training_dataset(
        self, train_set: Iterable[Any], k: int, order: ihvp.Order = ihvp.Order.DESCENDING
    ) -> tuple[Tensor, Tensor]:
        """(training inputs (k,*x), values (k,))."""
        recorded = Recorded(train_set)
        values, indices = self.native.compute_top_k_from_training_dataset(recorded, k, order)
        return recorded.inputs(indices), values


class Influence(SelfInfluence):
    """Values of training examples for samples to explain, in Influenciae's shapes."""

    def estimate_influence_values_in_batches(
        self, dataset_to_evaluate: Iterable[Any], train_set: Iterable[Any]
    ) -> Iterator[tuple[Any, Iterator[tuple[Any, Tensor]]]]:
        """(batch, iterator of (train batch, (B_test,B_train))) for each batch to explain."""
        return iter(self.native.estimate_influence_values_in_batches(dataset_to_evaluate, train_set))

    def top_k(
        self,
        dataset_to_evaluate: Iterable[Any],
        train_set: Iterable[Any],
        k: int = 5,
        order: ihvp.Order = ihvp.Order.DESCENDING,
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """(batch, values (B,k), training inputs (B,k,*x)) for each batch to explain."""
        recorded = Recorded(train_set)
        for raw, values, indices in list(self.native.top_k(dataset_to_evaluate, recorded, k, order)):
            yield raw, values, recorded.inputs(indices)


class Recorded:
    """A loader that remembers the inputs of its last pass, in the order in which they came."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.seen: list[Tensor] = []

    def __iter__(self) -> Iterator[Any]:
        self.seen = []
        for raw in self.loader:
            self.seen.append(raw.args[0] if isinstance(raw, ihvp.Batch) else raw[0])
            yield raw

    def inputs(self, indices: Tensor) -> Tensor:
        return torch.cat(self.seen)[indices.cpu()]


class Groups:
    native: Any

    def estimate_influence_values_group(
        self, groups_train: Iterable[Iterable[Any]], groups_to_explain: Iterable[Iterable[Any]] | None = None
    ) -> Iterator[Tensor]:
        """(1,1) for each pair of groups."""
        return iter(self.native.estimate_influence_values_group(groups_train, groups_to_explain))
