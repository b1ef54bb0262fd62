"""What all of pyDVL's influence classes have: four ways to ask, each also block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ihvp
from ihvp.adapters.pydvl_api.translation import InfluenceMode, check_factors, flat, matrices

if TYPE_CHECKING:
    from typing_extensions import Self

ByBlock = dict[str, Tensor]


class Influence(ABC):
    """fit, influences, influence_factors and influences_from_factors, each also block by block."""

    model: nn.Module
    names: Mapping[str, list[str]]
    """Block -> names of its parameters."""
    _ihvp: ihvp.IHVP

    @abstractmethod
    def fit(self, data: Iterable[Any]) -> Self:
        """The curvature of a loader of (x, y), replacing an earlier one; gives the object itself."""

    @property
    def is_fitted(self) -> bool:
        return self._ihvp.is_fitted

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def influences(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> Tensor:
        """+ <H^-1 g_test, g_n>: (n_test, n_train), or (n_test, n_train, *x). Without x and y the test data is both."""
        test, train = _pairs(x_test, y_test, x, y)
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            return self._calculator.perturbation([test], [train])
        if len(test[0]) <= len(train[0]):
            return self._calculator.scores([test], [train])
        return self._calculator.scores([train], [test]).T

    def influence_factors(self, x: Tensor, y: Tensor) -> Tensor:
        """H^-1 g of each example, (n,p): the blocks one after the other, each parameter by parameter."""
        return torch.cat(list(self.influence_factors_by_block(x, y).values()), dim=1)

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        """`influences` from what `influence_factors` gave; raises ValueError for factors of another shape."""
        names = [name for own in self.names.values() for name in own]
        return self._from_factors({"": z_test_factors}, {"": names}, x, y, mode)[""]

    def influences_by_block(
        self,
        x_test: Tensor,
        y_test: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> ByBlock:
        """Block -> its part of `influences`."""
        test, train = _pairs(x_test, y_test, x, y)
        if InfluenceMode(mode) is InfluenceMode.Up and len(test[0]) > len(train[0]):
            return {block: own.T for block, own in self.influences_by_block(*train, *test, mode).items()}
        return self.influences_from_factors_by_block(self.influence_factors_by_block(*test), *train, mode)

    def influence_factors_by_block(self, x: Tensor, y: Tensor) -> ByBlock:
        """Block -> (n,p_b)."""
        P = self._ihvp.compute_ihvp([(x, y)])
        return {block: flat(self._ihvp.model, P, own) for block, own in self.names.items()}

    def influences_from_factors_by_block(
        self, z_test_factors: ByBlock, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> ByBlock:
        """`influences_by_block` from what `influence_factors_by_block` gave; raises ValueError for other blocks."""
        return self._from_factors(z_test_factors, self.names, x, y, mode)

    def _from_factors(
        self, z: ByBlock, names: Mapping[str, list[str]], x: Tensor, y: Tensor, mode: InfluenceMode
    ) -> ByBlock:
        model = self._ihvp.model
        if set(z) != set(names):
            raise ValueError(f"factors must have the blocks {', '.join(map(repr, names))}, got {', '.join(z)}")
        if InfluenceMode(mode) is InfluenceMode.Perturbation:
            batch = model.batch((x, y))
            return {
                block: ihvp.input_gradients(model, matrices(model, z[block], own), batch)
                for block, own in names.items()
            }
        g = ihvp.IdentityIHVP(model).compute_ihvp([(x, y)])
        for block, own in names.items():
            check_factors(model, z[block], own)
        return {block: z[block].to(model.device, model.dtype) @ flat(model, g, own).T for block, own in names.items()}

    @property
    def _calculator(self) -> ihvp.FirstOrderInfluenceCalculator:
        if not self.is_fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted; call fit(data)")
        return ihvp.FirstOrderInfluenceCalculator(self._ihvp.model, None, self._ihvp)


def _pairs(
    x_test: Tensor, y_test: Tensor, x: Tensor | None, y: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if x is None and y is None:
        return (x_test, y_test), (x_test, y_test)
    if x is None or y is None:
        raise ValueError(f"x and y must be given together, got {'y' if x is None else 'x'} alone")
    return (x_test, y_test), (x, y)
