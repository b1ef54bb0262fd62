"""F = I: scores are dot products of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ihvp import ops
from ihvp.methods.base import LayerwiseIHVP, Vectors, read_state
from ihvp.methods.damping import Damping, resolve_damping
from ihvp.methods.queries import LayerQueries, TokenQueries, masked, written_out
from ihvp.model import InfluenceModel, Layer


class IdentityIHVP(LayerwiseIHVP):
    """The identity as curvature: solve(V) = V / (1 + damping). Passes over data: none.

    Source: Pruthi et al. 2020 (arXiv:2002.08484), the dot product of gradients that TracIn sums.
    """

    def __init__(
        self, model: InfluenceModel, hessian_loader: Iterable[Any] | None = None, damping: Damping = 0.0
    ) -> None:
        super().__init__(model, hessian_loader, damping)

    @property
    def is_fitted(self) -> bool:
        return True

    def fit(self, loader: Iterable[Any]) -> IdentityIHVP:
        """Nothing to sum; the loader is not read."""
        return self

    def _merge(self, others: Sequence[IdentityIHVP]) -> None:
        """Nothing to add."""

    def _scale(self, name: str, damping: Damping) -> float:
        return 1 / (1 + resolve_damping(damping, name, 1.0))

    def _solve_layer(self, name: str, V: Tensor, damping: Damping) -> Tensor:
        return V * self._scale(name, damping)

    def _multiply(self, V: Vectors) -> Vectors:
        return dict(V)

    def _queries_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> LayerQueries:
        return TokenQueries(
            masked(written_out(layer, a), mask), masked(delta, mask) * self._scale(layer.name, self.damping)
        )

    def _quadratic_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, power: int) -> Tensor:
        return ops.ghost_norm(a, delta, mask=mask, bias=layer.bias) * self._scale(layer.name, self.damping) ** power

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        read_state(state, {}, "IdentityIHVP")
