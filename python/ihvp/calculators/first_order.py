"""Scores of training examples for queries, by first-order influence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import Batch
from ihvp.capture import capture
from ihvp.methods.base import IHVP, Vectors, check_finite, complete
from ihvp.methods.queries import Queries, concatenate_queries
from ihvp.model import InfluenceModel, Layer

SIGNS = {"proponent": 1.0, "loss_change": -1.0}
NORMALIZATIONS = ("theta", "loss")


class Order(Enum):
    """Which end of the scores a top-k takes."""

    ASCENDING = "ascending"
    DESCENDING = "descending"


class FirstOrderInfluenceCalculator:
    """First-order influence: the score of training example n for query q is + g_q^T (F + damping I)^-1 g_n.

    With sign="proponent" (default) a positive score means that training on the example lowered the query's loss. With
    sign="loss_change" every result is the negative: the derivative of the query's loss with respect to the example's
    weight. No factor 1/N is hidden.

    Args:
        model: the InfluenceModel.
        train_loader: training data, where a method is not given any; also fits the curvature if it is not fitted.
        curvature: an IHVP object of the same model.
        normalize: RelatIF. True or "theta" divides by ||(F + damping I)^-1 g_n||, "loss" by
            sqrt(g_n^T (F + damping I)^-1 g_n). An example whose gradient is zero keeps the score zero.
        sign: "proponent" or "loss_change".

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 2; Barshan et al. 2020 (arXiv:2003.11630), eq. 4 and 7 (RelatIF).
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any] | None,
        curvature: IHVP,
        normalize: bool | str = False,
        sign: str = "proponent",
    ) -> None:
        if not isinstance(curvature, IHVP):
            raise TypeError(f"curvature must be an IHVP object, got {type(curvature).__name__}")
        if curvature.model is not model:
            raise ValueError("curvature must be an IHVP object of this model, got one of another InfluenceModel")
        if sign not in SIGNS:
            raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
        if not isinstance(normalize, bool) and normalize not in NORMALIZATIONS:
            raise ValueError(
                f"normalize must be False, True, {' or '.join(map(repr, NORMALIZATIONS))}, got {normalize!r}"
            )
        self.model = model
        self.train_loader = train_loader
        self.curvature = curvature
        self.normalize = "theta" if normalize is True else normalize
        self.sign = sign
        if not curvature.is_fitted:
            curvature.fit(self._data(None))

    # --- pairs of queries and training examples -----------------------------------------------------------------

    def scores(self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None) -> Tensor:
        """(Q,N) scores of all training examples for all queries: one pass over each."""
        queries = concatenate_queries([own for _, own in self._queries(test_loader)])
        return torch.cat([scores for _, scores in self._scored(queries, train_loader)], dim=1)

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
        best = _TopK(k, order)
        for _, scores in self._scored(concatenate_queries([own for _, own in found]), train_loader):
            best.add(scores)
        values, indices = best.result()
        sizes = [self.model.batch(raw).size for raw, _ in found]
        parts = zip(found, values.split(sizes), indices.split(sizes), strict=True)
        return iter([(raw, own_values, own_indices) for (raw, _), own_values, own_indices in parts])

    def estimate_influence_values_in_batches(
        self, test_loader: Iterable[Any], train_loader: Iterable[Any] | None = None
    ) -> Iterator[tuple[Any, Iterator[tuple[Any, Tensor]]]]:
        """For each test batch (batch, iterator of (train batch, (B_test,B_train))), computed as it is asked for.

        The training data is passed over once for each test batch; `scores` and `top_k` pass over it once in all.
        """
        for raw, queries in self._queries(test_loader):
            yield raw, self._scored(queries, train_loader)

    # --- training examples on their own -------------------------------------------------------------------------

    def self_scores(self, train_loader: Iterable[Any] | None = None) -> Tensor:
        """(N,) scores of each example for itself, g_n^T (F + damping I)^-1 g_n."""
        return torch.cat([values for _, values in self.compute_influence_values(train_loader)])

    def compute_influence_values(self, loader: Iterable[Any] | None = None) -> Iterator[tuple[Any, Tensor]]:
        """For each batch (batch, (B,) self-influence), computed as it is asked for."""
        for index, (raw, batch) in enumerate(self.model.passes(self._data(loader), "self-influence")):
            values = self.curvature.quadratic(batch, 1, index=index)
            yield raw, SIGNS[self.sign] * self._normalized(values, batch, index)

    def compute_top_k_from_training_dataset(
        self, loader: Iterable[Any] | None = None, k: int = 5, order: Order = Order.DESCENDING
    ) -> tuple[Tensor, Tensor]:
        """(values (k,), indices (k,)) of the self-influence, best first."""
        best = _TopK(k, order)
        for _, values in self.compute_influence_values(loader):
            best.add(values.unsqueeze(0))
        values, indices = best.result()
        return values[0], indices[0]

    # --- groups -------------------------------------------------------------------------------------------------

    def estimate_influence_values_group(
        self, train_groups: Iterable[Iterable[Any]], test_groups: Iterable[Iterable[Any]] | None = None
    ) -> Iterator[Tensor]:
        """(1,1) for each pair of groups: the sum of the scores of all pairs of their examples.

        A group is a loader. Without `test_groups` each training group is scored for itself. Normalisation divides by
        the norm of the group's summed gradient.

        Raises ValueError when there are not as many test groups as training groups.
        """
        trains = list(train_groups)
        tests = trains if test_groups is None else list(test_groups)
        if len(trains) != len(tests):
            raise ValueError(f"train_groups and test_groups must be as many, got {len(trains)} and {len(tests)}")
        for train, test in zip(trains, tests, strict=True):
            g = self._gradient_sum(train)
            P = self.curvature.solve(g)
            query = g if test is train else self._gradient_sum(test)
            value = _dot(query, P)
            if self.normalize == "theta":
                value = _divide(value, _dot(P, P))
            elif self.normalize == "loss":
                value = _divide(value, _dot(g, P))
            yield SIGNS[self.sign] * value.view(1, 1)

    def _gradient_sum(self, loader: Iterable[Any]) -> Vectors:
        """The sum of the gradients of a loader's examples, layer name -> (1,O,I')."""
        total: Vectors = {}

        def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
            positions = a.shape[0] * a.shape[1]  # all of them as those of one example
            rows = None if mask is None else mask.reshape(1, positions)
            one = ops.per_sample_gradient(
                a.reshape(1, positions, -1), delta.reshape(1, positions, -1), mask=rows, bias=layer.bias
            )
            total[layer.name] = total[layer.name] + one if layer.name in total else one

        for index, (_, batch) in enumerate(self.model.passes(loader, "group")):
            capture(self.model, batch, sink, index=index)
        return complete(self.model, total, 1)

    # --- passes -------------------------------------------------------------------------------------------------

    def _data(self, loader: Iterable[Any] | None) -> Iterable[Any]:
        data = self.train_loader if loader is None else loader
        if data is None:
            raise ValueError("no training data: give a loader here or to the constructor")
        return data

    def _queries(self, test_loader: Iterable[Any]) -> Iterator[tuple[Any, Queries]]:
        for index, (raw, batch) in enumerate(self.model.passes(test_loader, "queries")):
            yield raw, self.curvature.queries(batch, index=index)

    def _scored(self, queries: Queries, train_loader: Iterable[Any] | None) -> Iterator[tuple[Any, Tensor]]:
        """(batch, (Q,B) signed, normalised scores) for each training batch."""
        Q = next(iter(queries.values())).size
        for index, (raw, batch) in enumerate(self.model.passes(self._data(train_loader), "scores")):
            parts = [torch.zeros(Q, batch.size, dtype=self.model.dtype, device=self.model.device)]

            def sink(
                layer: Layer,
                a: Tensor,
                delta: Tensor,
                mask: Tensor | None,
                parts: list[Tensor] = parts,
                index: int = index,
            ) -> None:
                parts[0] = parts[0] + queries[layer.name].scores(layer, a, delta, mask)
                check_finite(layer, index, score=parts[0])

            capture(self.model, batch, sink, index=index)
            yield raw, SIGNS[self.sign] * self._normalized(parts[0], batch, index)

    def _normalized(self, values: Tensor, batch: Batch, index: int) -> Tensor:
        if self.normalize is False:
            return values
        power = 2 if self.normalize == "theta" else 1
        return _divide(values, self.curvature.quadratic(batch, power, index=index))


class _TopK:
    """The k best of scores that come in blocks of columns."""

    def __init__(self, k: int, order: Order) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        if not isinstance(order, Order):
            raise TypeError(f"order must be an ihvp.Order, got {order!r}")
        self.k, self.order = k, order
        self.seen = 0
        self.values: Tensor | None = None
        self.indices: Tensor | None = None

    def add(self, scores: Tensor) -> None:
        indices = torch.arange(self.seen, self.seen + scores.shape[1], device=scores.device).expand_as(scores)
        self.seen += scores.shape[1]
        if self.values is not None and self.indices is not None:
            scores, indices = torch.cat([self.values, scores], dim=1), torch.cat([self.indices, indices], dim=1)
        largest = self.order is Order.DESCENDING
        self.values, at = scores.topk(min(self.k, scores.shape[1]), dim=1, largest=largest)
        self.indices = indices.gather(1, at)

    def result(self) -> tuple[Tensor, Tensor]:
        if self.seen < self.k or self.values is None or self.indices is None:
            raise ValueError(f"k must be at most the number of training examples, {self.seen}, got {self.k}")
        return self.values, self.indices


def _dot(V: Vectors, W: Vectors) -> Tensor:
    return torch.stack([(V[name] * W[name]).sum() for name in V]).sum()


def _divide(values: Tensor, squares: Tensor) -> Tensor:
    """values / sqrt(squares), zero where that is zero."""
    if bool((squares < 0).any()):
        raise torch.linalg.LinAlgError(
            f"normalize needs a positive curvature, got g^T (F + damping I)^-1 g = {float(squares.min()):.3g}; "
            "a larger damping helps"
        )
    norms = squares.sqrt()
    return torch.where(norms > 0, values / norms.clamp_min(torch.finfo(norms.dtype).tiny), values.new_zeros(()))
