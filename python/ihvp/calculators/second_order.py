"""The influence of removing a group, to second order: its members' gradients and how they bend each other's effect."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ihvp.calculators.base import SIGNS
from ihvp.calculators.first_order import dot
from ihvp.calculators.groups import Groups, gradient_sum, paired
from ihvp.methods.base import IHVP
from ihvp.model import InfluenceModel


@dataclass(frozen=True)
class GroupInfluence:
    """The two parts of a group's influence, (1,1) each."""

    first_order: Tensor
    second_order: Tensor

    @property
    def total(self) -> Tensor:
        return self.first_order + self.second_order


class SecondOrderInfluenceCalculator:
    """Second-order group influence of U, p = |U| / N, on a test group with summed gradient t:

        (1 - 2p) / (1 - p)^2  t^T H^-1 g_U  +  p / (1 - p)^2  t^T H^-1 H_U H^-1 g_U,

    with H = F + damping I the curvature of all training data, H_U the undamped curvature of the group's mean loss and
    g_U its summed gradient. No factor 1/N is hidden: the value divided by N estimates how much removing the group
    raises the test group's summed loss. As p goes to 0 it becomes the first-order value, the sum of the pairs' scores.

    Args:
        model: the InfluenceModel.
        train_loader: all training data; fits the curvature if it is not fitted, and gives N.
        curvature: an IHVP object of the same model that multiplies; a copy of it is fitted to each group.
        sign: "proponent": positive when the group lowers the test group's loss; or "loss_change", the negative.

    Source: Basu et al. 2020 (arXiv:1911.00418), there with the factor 1/N.
    """

    def __init__(
        self, model: InfluenceModel, train_loader: Iterable[Any], curvature: IHVP, sign: str = "proponent"
    ) -> None:
        if not isinstance(curvature, IHVP):
            raise TypeError(f"curvature must be an IHVP object, got {type(curvature).__name__}")
        if curvature.model is not model:
            raise ValueError("curvature must be an IHVP object of this model, got one of another InfluenceModel")
        if sign not in SIGNS:
            raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}")
        self.model = model
        self.curvature = curvature
        self.sign = sign
        self.examples = sum(model.batch(raw).size for raw, _ in model.passes(train_loader, "training examples"))
        if not curvature.is_fitted:
            curvature.fit(train_loader)

    def estimate_influence_values_group(
        self, train_groups: Groups, test_groups: Groups | None = None
    ) -> Iterator[Tensor]:
        """(1,1) for each pair of groups. A group is a loader; without `test_groups` each group meets itself.

        Raises ValueError when there are not as many test groups as training groups, when a group is empty, or when it
        is as large as the training data.
        """
        for parts in self.estimate_influence_parts_group(train_groups, test_groups):
            yield parts.total

    def estimate_influence_parts_group(
        self, train_groups: Groups, test_groups: Groups | None = None
    ) -> Iterator[GroupInfluence]:
        """`estimate_influence_values_group` with the first-order and the second-order part apart, each (1,1)."""
        for train, test in paired(train_groups, test_groups):
            g, size = gradient_sum(self.model, train)
            if size >= self.examples:
                raise ValueError(
                    f"a group must be smaller than the training data of {self.examples} examples, got {size}"
                )
            query = g if test is train else gradient_sum(self.model, test)[0]
            P = self.curvature.solve(g)
            bent = self.curvature.solve(copy.copy(self.curvature).fit(train).multiply(P))
            p = size / self.examples
            scale = SIGNS[self.sign] / (1 - p) ** 2
            yield GroupInfluence(
                (scale * (1 - 2 * p) * dot(query, P)).view(1, 1), (scale * p * dot(query, bent)).view(1, 1)
            )
