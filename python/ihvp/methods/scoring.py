"""The scores of one batch, summed over the layers: a sink in which small layers wait to be scored together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import Batch, FiniteChecks, all_finite
from ihvp.cache import Tokens
from ihvp.methods.base import check_finite
from ihvp.methods.queries import DenseQueries, Queries, small_layers
from ihvp.model import InfluenceModel, Layer

WAITING = 1 << 28  # bytes of tokens kept until they are scored

K = TypeVar("K")


class BatchScores(Generic[K]):
    """A sink of `capture`: the (Q,N) scores of a batch for several queries, each of all layers or of some.

    A layer is scored as it comes. Small ones wait with their tokens, until all have come or WAITING bytes are held, and
    are scored by one call: `ops.gradient_dot_grouped`. With `per_token` the scores are (Q,N,T) and no layer waits.
    """

    def __init__(
        self, model: InfluenceModel, parts: Mapping[K, Queries], batch: Batch, index: int, *, per_token: bool = False
    ) -> None:
        self.parts, self.index, self.per_token = parts, index, per_token
        self._small = frozenset() if per_token else small_layers(model)
        self._first: tuple[str, int] | None = None  # the layer that came first, and its positions
        self._finite = FiniteChecks()
        self._waiting: list[Tokens] = []
        self._bytes = 0
        self._totals: dict[K, Tensor] = {}
        for key, queries in parts.items():
            Q = next(iter(queries.values())).size
            shape = (Q, batch.size, 1) if per_token else (Q, batch.size)
            self._totals[key] = torch.zeros(shape, dtype=model.dtype, device=model.device)

    def __call__(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        if self.per_token:
            first, T = self._first = self._first or (layer.name, a.shape[1])
            if a.shape[1] != T:
                raise ValueError(
                    f"scores by token need layers of the same positions, got {T} in {first!r} and {a.shape[1]} in "
                    f"{layer.name!r}: a layer that is used several times has its uses one after the other; leave some "
                    "out by layers=[...]"
                )
        if layer.name not in self._small:
            for key in self.parts:
                self._add(key, layer, a, delta, mask)
            return
        self._waiting.append((layer, a, delta, mask))
        self._bytes += a.nbytes + delta.nbytes
        if self._bytes > WAITING:
            self._score_waiting()

    def totals(self) -> dict[K, Tensor]:
        """(Q,N), or (Q,N,T), for each of the queries, when all layers have come."""
        self._score_waiting()
        self._finite.finish()
        return self._totals

    def _add(self, key: K, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        queries = self.parts[key]
        if layer.name in queries:
            scores = queries[layer.name].scores(layer, a, delta, mask, per_token=self.per_token)
            self._totals[key] = self._totals[key] + scores
            check_finite(self._finite, layer, self.index, score=self._totals[key])

    def _score_waiting(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        for key, queries in self.parts.items():
            groups: dict[tuple[object, ...], list[Tokens]] = {}
            for tokens in waiting:
                layer, a, delta, mask = tokens
                own = queries.get(layer.name)
                if isinstance(own, DenseQueries):
                    # What one call has in common: a layer used twice has twice the positions, and a mask of its own.
                    kind = (own.P.dtype, a.dtype, delta.dtype, a.shape[1], layer.bias, id(mask))
                    groups.setdefault(kind, []).append(tokens)
                elif own is not None:
                    self._add(key, *tokens)
            for group in groups.values():
                self._add_group(key, group)

    def _add_group(self, key: K, group: list[Tokens]) -> None:
        if len(group) > 1:
            layers, a, delta, masks = zip(*group, strict=True)
            P = [self.parts[key][layer.name].dense() for layer in layers]
            scores = ops.gradient_dot_grouped(P, a, delta, mask=masks[0], bias=layers[0].bias)
            total = self._totals[key] + scores
            if all_finite(total):
                self._totals[key] = total
                return
        for tokens in group:  # one by one, the layer at fault is named
            self._add(key, *tokens)
