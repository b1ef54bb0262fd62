"""pyDVL's EKFAC, for linear layers and cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ihvp
from ihvp.adapters.pydvl_api.influence import ByBlock, Influence
from ihvp.adapters.pydvl_api.translation import influence_model, trainable

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT_BYTES = 2**28  # of tokens between the two passes of a fit


def pseudo_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """(N,): sum_c sqrt(p_c) log p_c, the roots held fixed. pyDVL's curvature is that of these gradients.

    It is neither the empirical Fisher matrix nor the model's own: ihvp.EKFACIHVP has both.
    """
    log_p = outputs.log_softmax(1)
    return (log_p * log_p.detach().exp().sqrt()).sum(1)


class EkfacInfluence(Influence):
    """EKFAC with pyDVL's curvature; the loss is the cross-entropy. Inputs are (N,features).

    Args:
        update_diagonal: measure the diagonal in the eigenbasis, in a second pass over the data.
        hessian_regularization: added to the diagonal.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: float = 0.0,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.update_diagonal = update_diagonal
        names = trainable(model)
        own = influence_model(model, cross_entropy, names, progress)
        frozen = own.weights.keys() - set(names)
        if frozen:
            raise ValueError(f"a layer's parameters must all be trainable or none, {sorted(frozen)} are not")
        self.names = {layer.module: list(layer.parameters()) for layer in own.layers.values()}
        self._curved = ihvp.InfluenceModel(
            model, pseudo_loss, layers=list(self.names), progress=progress, cache_bytes=KEPT_BYTES
        )
        self._ihvp: ihvp.EKFACIHVP = ihvp.EKFACIHVP(own, None, hessian_regularization, update_diagonal)

    @property
    def hessian_regularization(self) -> float:
        damping = self._ihvp.damping
        assert isinstance(damping, (int, float))
        return damping

    @hessian_regularization.setter
    def hessian_regularization(self, value: float) -> None:
        self._ihvp = self._ihvp.with_damping(value)

    def fit(self, data: Iterable[Any]) -> Self:
        try:
            fitted = ihvp.EKFACIHVP(self._curved, data, 0.0, self.update_diagonal)
        finally:
            self._curved.clear_cache()
        self._ihvp.load_state_dict(fitted.state_dict())
        return self

    # A block is a layer.
    influences_by_layer = Influence.influences_by_block
    influence_factors_by_layer = Influence.influence_factors_by_block
    influences_from_factors_by_layer = Influence.influences_from_factors_by_block

    def explore_hessian_regularization(
        self, x: Tensor, y: Tensor, regularization_values: Sequence[float]
    ) -> dict[float, ByBlock]:
        """Value -> layer -> (n,n), the influences of the data on itself; all values share one rotation."""
        pair = [(x, y)]
        return self._calculator.explore_damping(pair, pair, regularization_values)
