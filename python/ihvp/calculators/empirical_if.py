"""Empirical influence: how the losses of a query and of an example change together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import SIGNS, InfluenceCalculator
from ihvp.calculators.functional import call, displaced
from ihvp.capture import untouched
from ihvp.methods.base import Vectors, concatenate, gradients
from ihvp.model import InfluenceModel

Checked = tuple[int, float, float]
"""(index of the training example, its score for the query, the score with the roles exchanged)."""


@dataclass(frozen=True)
class Steps:
    """Queries: their gradients, layer name -> (Q,O,I'), and the change (Q,2) of their losses after either step."""

    g: Vectors
    changes: Tensor


class EmpiricalInfluence(InfluenceCalculator[Steps]):
    """EmpiricalIF: the score of training example n for query q is

        (dL_q+ dL_n+ + dL_q- dL_n-) / 2,

    the changes of the two losses after one step of gradient ascent (+) on the query's loss, and of descent (-). With
    sign="proponent" a positive score means that the losses move together: the example helps. The score goes to
    step^2 ||g_q||^2 g_q^T g_n as the step goes to zero. Two passes over the training data a query, no backward pass.

    Args:
        model: the InfluenceModel; the tracked layers are those that move.
        train_loader: training data, where a method is not given any.
        step: length of a step, times the query's gradient.
        sign: "proponent" or "loss_change".

    Source: Liu et al. 2022, Debugging and Explaining Metric Learning Approaches: An Influence Function Based
    Perspective (NeurIPS), with raw gradients as directions.
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any] | None = None,
        step: float = 0.1,
        sign: str = "proponent",
    ) -> None:
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < float("inf"):
            raise ValueError(f"step must be a positive number, got {step!r}")
        super().__init__(model, train_loader, sign)
        self.step = float(step)

    def _ready(self, batch: Batch, index: int) -> Steps:
        g = gradients(self.model, batch, index=index)
        return Steps(g, self._changes(g, batch).diagonal(dim1=0, dim2=2).T)

    def _joined(self, parts: Sequence[Steps]) -> Steps:
        return Steps(concatenate([dict(part.g) for part in parts]), torch.cat([part.changes for part in parts]))

    def _scored(self, queries: Steps, batch: Batch, index: int) -> Tensor:
        return torch.einsum("qs,qsn->qn", queries.changes, self._changes(queries.g, batch)) / 2

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        return self._ready(batch, index).changes.square().sum(1) / 2

    def _changes(self, g: Vectors, batch: Batch) -> Tensor:
        """(Q,2,N): the change of the batch's losses after a step of ascent and one of descent along each g_q."""
        model = self.model
        with torch.no_grad(), untouched(model.net):
            before = model.losses(model.net(*batch.args, **batch.kwargs), batch, batch.targets)
            Q = len(next(iter(g.values())))
            changes = before.new_zeros(Q, 2, len(before))
            for q in range(Q):
                for side, length in enumerate((self.step, -self.step)):
                    weights = displaced(model, {name: length * own[q] for name, own in g.items()})
                    changes[q, side] = model.losses(call(model, batch, weights), batch, batch.targets) - before
        return changes.to(model.dtype)

    def reverse_check(
        self, query_input: Any, query_target: Any, influence_values: Tensor | Sequence[float], check_ratio: float = 0.01
    ) -> tuple[list[Checked], list[Checked]]:
        """Scores with the roles exchanged, of the training examples with the highest and the lowest values.

        An example that influences the query should be influenced by it: the reverse score steps along the example's
        gradient. The training data must come in the order of the values.

        Args:
            query_input, query_target: one query, as a batch of size 1.
            influence_values: (N,), its scores.
            check_ratio: the share of the training data at either end, at least one example.

        Returns:
            (highest, lowest), each a list of (index, value, reverse score), the outermost first.

        Raises:
            ValueError: more than one query, not as many values as training examples, or a share outside (0, 1].
        """
        values = torch.as_tensor(influence_values, dtype=torch.float64)
        query = self.model.batch((query_input, query_target))
        if query.size != 1:
            raise ValueError(f"query_input must be a batch of 1, got {query.size}")
        if not 0 < check_ratio <= 1:
            raise ValueError(f"check_ratio must be in (0, 1], got {check_ratio}")
        if values.dim() != 1:
            raise ValueError(f"influence_values must be (N,), got {tuple(values.shape)}")
        order = values.argsort(descending=True, stable=True)
        count = max(1, int(len(values) * check_ratio))
        ends = order[:count], order.flip(0)[:count]
        chosen = torch.cat(ends).unique()
        reverse: dict[int, float] = {}
        seen = 0
        for index, (_, batch) in enumerate(self.model.passes(self._data(None), "reverse check")):
            own = chosen[(chosen >= seen) & (chosen < seen + batch.size)]
            if len(own):
                rows = (own - seen).to(self.model.device)
                one = self._ready(batch.map(itemgetter(rows)), index)
                scores = SIGNS[self.sign] * self._scored(one, query, index)
                reverse |= dict(zip(own.tolist(), scores[:, 0].tolist(), strict=True))
            seen += batch.size
        if seen != len(values):
            raise ValueError(f"influence_values must be (N,) with N={seen} training examples, got {len(values)}")
        highest, lowest = ([(i, float(values[i]), reverse[i]) for i in end.tolist()] for end in ends)
        return highest, lowest
