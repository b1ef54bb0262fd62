"""The names, arguments and result shapes of Influenciae, over ihvp, on torch models and loaders.

    influence_model = InfluenceModel(net, start_layer="hidden", last_layer="classifier", loss_function=loss)
    ihvp_calculator = EKFACIHVP(influence_model, train_dataset, damping=1e-3)
    calculator = FirstOrderInfluenceCalculator(influence_model, train_dataset, ihvp_calculator)
    for (inputs, labels), influence_values, train_samples in calculator.top_k(test_dataset, train_dataset, k=5): ...

Values have Influenciae's sign: + g_test^T H^-1 g_train, positive for an example that lowered the loss. Its guide prints
the influence with the other sign. Self-influence has the shape (B,1), a top-k brings the training inputs themselves.
Losses take (outputs, targets) and are not reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ihvp

ORDER = ihvp.Order

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


# --- inverse-Hessian-vector products -----------------------------------------------------------------------------


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
    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any] | None = None,
        damping: float = 1e-3,
        *,
        regul: float | None = None,
    ) -> None:
        super().__init__(model, train_dataset, damping if regul is None else regul)


class _ByPosition:
    """`layer_info[i]["layer"]`, and the factors by the same position i instead of the layer's name."""

    model: ihvp.InfluenceModel

    @property
    def layer_info(self) -> dict[int, dict[str, Any]]:
        return {i: {"layer": layer} for i, layer in enumerate(self.model.layers.values())}

    @property
    def kfac_blocks(self) -> dict[int, tuple[Tensor, Tensor]]:
        return dict(enumerate(super().kfac_blocks.values()))  # type: ignore[misc]

    @property
    def evecs(self) -> dict[int, tuple[Tensor, Tensor]]:
        return dict(enumerate(super().evecs.values()))  # type: ignore[misc]

    @property
    def evals(self) -> dict[int, Tensor]:
        return dict(enumerate(super().evals.values()))  # type: ignore[misc]


class KFACIHVP(_ByPosition, ihvp.KFACIHVP):  # type: ignore[misc]
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


class EKFACIHVP(_ByPosition, ihvp.EKFACIHVP):  # type: ignore[misc]
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
        return IHVPS[self.name](model_influence, dataset)


def _built(calculator: Any, model: ihvp.InfluenceModel, dataset: Iterable[Any]) -> ihvp.IHVP:
    """An IHVP object as it is; else by its name or its factory."""
    if isinstance(calculator, ihvp.IHVP):
        return calculator
    factory = IHVPFactory(calculator) if isinstance(calculator, str) else calculator
    built: ihvp.IHVP = factory.build(model, dataset)
    return built


# --- calculators -------------------------------------------------------------------------------------------------


class _SelfInfluence:
    """Values of training examples on their own, in Influenciae's shapes."""

    native: Any

    def compute_influence_values(self, train_set: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
        """(batch, (B,1)) for each batch."""
        for raw, values in self.native.compute_influence_values(train_set):
            yield raw, values.unsqueeze(1)

    def compute_top_k_from_training_dataset(
        self, train_set: Iterable[Any], k: int, order: ihvp.Order = ORDER.DESCENDING
    ) -> tuple[Tensor, Tensor]:
        """(training inputs (k,*x), values (k,))."""
        recorded = _Recorded(train_set)
        values, indices = self.native.compute_top_k_from_training_dataset(recorded, k, order)
        return recorded.inputs(indices), values


class _Influence(_SelfInfluence):
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
        order: ihvp.Order = ORDER.DESCENDING,
    ) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """(batch, values (B,k), training inputs (B,k,*x)) for each batch to explain."""
        recorded = _Recorded(train_set)
        for raw, values, indices in list(self.native.top_k(dataset_to_evaluate, recorded, k, order)):
            yield raw, values, recorded.inputs(indices)


class _Recorded:
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


class _Groups:
    native: Any

    def estimate_influence_values_group(
        self, groups_train: Iterable[Iterable[Any]], groups_to_explain: Iterable[Iterable[Any]] | None = None
    ) -> Iterator[Tensor]:
        """(1,1) for each pair of groups."""
        return iter(self.native.estimate_influence_values_group(groups_train, groups_to_explain))


class FirstOrderInfluenceCalculator(_Influence, _Groups):
    """`normalize=True` is RelatIF. Without an IHVP object the exact Hessian of the dataset."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator: ihvp.IHVP | IHVPFactory | str = "exact",
        normalize: bool = False,
    ) -> None:
        self.native = ihvp.FirstOrderInfluenceCalculator(
            model, dataset, _built(ihvp_calculator, model, dataset), normalize
        )


class SecondOrderInfluenceCalculator(_Groups):
    """Groups to second order."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator: ihvp.IHVP | IHVPFactory | str = "exact",
    ) -> None:
        self.native = ihvp.SecondOrderInfluenceCalculator(model, dataset, _built(ihvp_calculator, model, dataset))


class ArnoldiInfluenceCalculator(_Influence):
    """First-order influence in the span of the Hessian's `k_largest_eig_vals` largest eigenvectors.

    They are found in a Krylov space of `subspace_dim` dimensions, orthogonalised as that of a symmetric matrix.
    """

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any],
        subspace_dim: int,
        force_hermitian: bool,
        k_largest_eig_vals: int,
    ) -> None:
        if not force_hermitian:
            raise ValueError("force_hermitian must be True: the Hessian is symmetric, and is treated as such")
        curvature = ihvp.ArnoldiIHVP(model, train_dataset, rank=k_largest_eig_vals, krylov_dimension=subspace_dim)
        self.native = ihvp.FirstOrderInfluenceCalculator(model, train_dataset, curvature)


class TracIn(_Influence):
    """A model for each checkpoint, all of one architecture, and their learning rates."""

    def __init__(self, models: Sequence[ihvp.InfluenceModel], learning_rates: float | Sequence[float]) -> None:
        states = [model.net.state_dict() for model in models]
        self.native = ihvp.TracInCalculator(models[0], None, states, learning_rates)


class RepresenterPointL2(_Influence):
    """The last linear layer of a net, refitted with `lambda_regularization ||W||^2` to the loss itself."""

    def __init__(
        self, model: nn.Module, train_set: Iterable[Any], loss_function: Loss, lambda_regularization: float
    ) -> None:
        own = InfluenceModel(model, loss_function=loss_function)
        self.native = ihvp.RepresenterPointL2(own, train_set, lambda_regularization)


class RepresenterPointLJE(_Influence):
    """The last linear layer of the model's net, by one Newton step with the IHVP object that the factory builds."""

    def __init__(
        self,
        influence_model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator_factory: IHVPFactory | str = "exact",
    ) -> None:
        own = InfluenceModel(influence_model.net, loss_function=influence_model.loss_fn)
        own.process_batch = influence_model.process_batch
        self.native = ihvp.RepresenterPointLJE(own, dataset, _built(ihvp_calculator_factory, own, dataset))


class SampleBoundaryCalculator(_SelfInfluence):
    """Minus the distance of a sample to the decision boundary."""

    def __init__(self, model: nn.Module, step_nbr: int = 100, eps: float = 1e-6) -> None:
        self.native = ihvp.SampleBoundaryCalculator(InfluenceModel(model), steps=step_nbr, eps=eps)


class WeightsBoundaryCalculator(_SelfInfluence):
    """Minus the distance of the weights to those that change a sample's class; of the linear layers."""

    def __init__(self, model: nn.Module, step_nbr: int = 100, norm_type: int = 2, eps: float = 1e-6) -> None:
        if norm_type != 2:
            raise ValueError(f"norm_type must be 2, got {norm_type}")
        self.native = ihvp.WeightsBoundaryCalculator(InfluenceModel(model, 0, -1), steps=step_nbr, eps=eps)
