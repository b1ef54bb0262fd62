"""What both kinds of pyDVL's influence classes translate: modes, losses, flat vectors, the four ways to ask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ihvp

if TYPE_CHECKING:
    from typing_extensions import Self

Loss = Callable[[Tensor, Tensor], Tensor]
Vectors = dict[str, Tensor]
ByBlock = dict[str, Tensor]


class InfluenceMode(str, Enum):
    """Up: (n_test, n_train) of up-weighting. Perturbation: (n_test, n_train, *x), derivatives by the training input."""

    Up = "up"
    Perturbation = "perturbation"


class BlockMode(Enum):
    """One block of the name "", a block for each child of the net, or for each parameter, under their names."""

    LAYER_WISE = "layer_wise"
    PARAMETER_WISE = "parameter_wise"
    FULL = "full"


class SecondOrderMode(Enum):
    """The mean Hessian, or what pyDVL calls the Gauss-Newton matrix: the mean of g_n g_n^T."""

    HESSIAN = "hessian"
    GAUSS_NEWTON = "gauss_newton"


CURVATURES = {SecondOrderMode.HESSIAN.value: "hessian", SecondOrderMode.GAUSS_NEWTON.value: "fisher"}
"""By the modes' values, so that pyDVL's own modes serve too."""


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def influence_model(model: nn.Module, loss: Loss, names: Iterable[str], progress: bool) -> ihvp.InfluenceModel:
    """The layers of the named parameters; a reduced loss is taken example by example."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        single = torch.vmap(lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)))
        return single(outputs, targets)

    return ihvp.InfluenceModel(model, losses, layers=layers, progress=progress)


def flat(model: ihvp.InfluenceModel, V: Vectors, names: Iterable[str]) -> Tensor:
    """Layer name -> (Q,O,I') as (Q,p), the named parameters one after the other."""
    parts = {key: part for name, layer in model.layers.items() for key, part in layer.split(V[name]).items()}
    return torch.cat([parts[name].flatten(1) for name in names], dim=1)


def matrices(model: ihvp.InfluenceModel, z: Tensor, names: Iterable[str]) -> Vectors:
    """The way back, with zeros for the parameters that are not named."""
    names = list(names)
    sizes = check_factors(model, z, names)
    given = dict(zip(names, z.to(model.device, model.dtype).split(sizes, dim=1), strict=True))
    V = {}
    for name, layer in model.layers.items():
        own = {
            key.removeprefix(f"{name}."): given[key].unflatten(1, p.shape)
            if key in given
            else torch.zeros(len(z), *p.shape, dtype=model.dtype, device=model.device)
            for key, p in layer.parameters().items()
        }
        V[name] = layer.type.join(layer.modules[0], own)
    return V


def check_factors(model: ihvp.InfluenceModel, z: Tensor, names: Iterable[str]) -> list[int]:
    """The sizes of the named parameters, which together are the columns of z."""
    sizes = [model.weights[name].numel() for name in names]
    if z.dim() != 2 or z.shape[1] != sum(sizes):
        raise ValueError(f"factors must be (n,p) with p={sum(sizes)}, got {tuple(z.shape)}")
    return sizes


class Influence(ABC):
    """fit, influences, influence_factors and influences_from_factors, each also block by block."""

    model: nn.Module
    names: Mapping[str, list[str]]
    """Block -> names of its parameters."""
    _ihvp: ihvp.IHVP

    @abstractmethod
    def fit(self, data: Iterable[Any]) -> Self: ...

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
        return torch.cat(list(self._factors(x, y).values()), dim=1)

    def influences_from_factors(
        self, z_test_factors: Tensor, x: Tensor, y: Tensor, mode: InfluenceMode = InfluenceMode.Up
    ) -> Tensor:
        names = [name for own in self.names.values() for name in own]
        return self._from_factors({"": z_test_factors}, {"": names}, x, y, mode)[""]

    def _influences(
        self, x_test: Tensor, y_test: Tensor, x: Tensor | None, y: Tensor | None, mode: InfluenceMode
    ) -> ByBlock:
        test, train = _pairs(x_test, y_test, x, y)
        if InfluenceMode(mode) is InfluenceMode.Up and len(test[0]) > len(train[0]):
            return {block: own.T for block, own in self._influences(*train, *test, mode).items()}
        return self._from_factors(self._factors(*test), self.names, *train, mode)

    def _factors(self, x: Tensor, y: Tensor) -> ByBlock:
        P = self._ihvp.compute_ihvp([(x, y)])
        return {block: flat(self._ihvp.model, P, own) for block, own in self.names.items()}

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
