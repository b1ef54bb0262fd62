"""The k best of scores that come in blocks of columns."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Order(Enum):
    """Which end of the scores a top-k takes."""

    ASCENDING = "ascending"
    DESCENDING = "descending"


class TopK:
    """Keeps k candidates a query: add (Q,B) blocks of columns, then read (values (Q,k), indices (Q,k)), best first."""

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
