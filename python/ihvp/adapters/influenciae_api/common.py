"""`deel.influenciae.common`: the model to explain, and the inverse-Hessian-vector-product objects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import ihvp

Loss = Callable[[Any, Any], Tensor]


class InfluenceModel(ihvp.InfluenceModel):
    """The weights of the linear layers from start_layer to last_layer, each by name or by position among them.

    start_layer None: the last one; last_layer None: start_layer alone. `InfluenceModel(model, target_layer,
    loss_function)` works too.
    """

    def __init__(
        self,
        model: nn.Module,
        start_layer: str | int | None = None,
        last_layer: str | int | Loss | None = None,
        loss_function: Loss | None = None,
        process_batch_for_loss_fn: Callable[[Any], tuple[Any, Any, Tensor | None]] | None = None,
    ) -> None:
        if last_layer is not None and not isinstance(last_layer, (str, int)):
            last_layer, loss_function = None, last_layer
        start = -1 if start_layer is None else start_layer
        super().__init__(
            model,
            nn.CrossEntropyLoss(reduction="none") if loss_function is None else loss_function,
            [nn.Linear],
            start,
            start if last_layer is None else last_layer,
            lambda raw: _batch(raw if process_batch_for_loss_fn is None else process_batch_for_loss_fn(raw)),
        )


def _batch(raw: Any) -> Any:
    """(inputs, labels) or (inputs, labels, sample weights or None)."""
    if isinstance(raw, (tuple, list)) and len(raw) == 3:
        inputs, labels, weights = raw
        return ihvp.Batch(args=(inputs,), targets=labels, weights=weights)
    return raw


class ExactIHVP(ihvp.ExactIHVP):
    """The mean Hessian and its pseudo-inverse."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        train_hessian: Tensor | None = None,
    ) -> None:
        rcond = 10 * model.nb_params * torch.finfo(model.dtype).eps
        super().__init__(model, train_dataset, 0.0, rcond=rcond, train_hessian=train_hessian)


class FisherIHVP(ihvp.FisherIHVP):
    """The empirical Fisher matrix plus the damping, which is also spelt `regul`."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        damping: float = 1e-3,
        *,
        regul: float | None = None,
    ) -> None:
        super().__init__(model, train_dataset, damping if regul is None else regul)


class _ByPosition(ihvp.KroneckerIHVP):
    """`layer_info[i]["layer"]`, and the factors by the same position i instead of the layer's name."""

    @property
    def layer_info(self) -> dict[int, dict[str, Any]]:
        return {i: {"layer": layer} for i, layer in enumerate(self.model.layers.values())}

    @property
    def kfac_blocks(self) -> dict[Any, tuple[Tensor, Tensor]]:
        return dict(enumerate(super().kfac_blocks.values()))

    @property
    def evecs(self) -> dict[Any, tuple[Tensor, Tensor]]:
        return dict(enumerate(super().evecs.values()))

    @property
    def evals(self) -> dict[Any, Tensor]:
        return dict(enumerate(super().evals.values()))


class KFACIHVP(_ByPosition, ihvp.KFACIHVP):
    """KFAC, its damping split by pi or evenly."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        damping: float = 1e-3,
        use_pi: bool = True,
        *,
        regul: float | None = None,
    ) -> None:
        super().__init__(model, train_dataset, damping if regul is None else regul, use_pi=use_pi)


class EKFACIHVP(_ByPosition, ihvp.EKFACIHVP):
    """EKFAC, with the measured eigenvalues or KFAC's."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        damping: float = 1e-3,
        update_eigen: bool = True,
        *,
        regul: float | None = None,
    ) -> None:
        super().__init__(model, train_dataset, damping if regul is None else regul, update_eigen)


class ConjugateGradientDescentIHVP(ihvp.CgIHVP):
    """The mean Hessian by conjugate gradients, each system on its own."""

    def __init__(
        self, model: ihvp.InfluenceModel, train_dataset: Iterable[Any] | None = None, n_cgd_iters: int = 100
    ) -> None:
        super().__init__(model, train_dataset, maxiter=n_cgd_iters)


class LissaIHVP(ihvp.LissaIHVP):
    """The mean Hessian by LiSSA; `damping` is added to it, `scale` divides it."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        n_cgd_iters: int = 100,
        damping: float = 1e-4,
        scale: float = 10.0,
    ) -> None:
        super().__init__(model, train_dataset, damping, maxiter=n_cgd_iters, scale=scale)


IHVPS: dict[str, Callable[[ihvp.InfluenceModel, Iterable[Any]], ihvp.IHVP]] = {
    "exact": ExactIHVP,
    "cgd": ConjugateGradientDescentIHVP,
    "lissa": LissaIHVP,
    "fisher": FisherIHVP,
    "kfac": KFACIHVP,
    "ekfac": EKFACIHVP,
}


class IHVPFactory:
    """The IHVP object of a name in IHVPS, with its own defaults."""

    def __init__(self, name: str) -> None:
        if name not in IHVPS:
            raise ValueError(f"ihvp_calculator must be one of {', '.join(IHVPS)}, got {name!r}")
        self.name = name

    def build(self, model_influence: ihvp.InfluenceModel, dataset: Iterable[Any]) -> ihvp.IHVP:
        """The object, fitted with the dataset."""
        return IHVPS[self.name](model_influence, dataset)


def built(calculator: Any, model: ihvp.InfluenceModel, dataset: Iterable[Any]) -> ihvp.IHVP:
    """An IHVP object as it is; else by its name or its factory."""
    if isinstance(calculator, ihvp.IHVP):
        return calculator
    factory = IHVPFactory(calculator) if isinstance(calculator, str) else calculator
    built: ihvp.IHVP = factory.build(model, dataset)
    return built
