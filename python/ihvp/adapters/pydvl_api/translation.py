"""pyDVL's modes, losses and flat vectors, as ihvp has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import torch
from torch import Tensor, nn

import ihvp

Loss = Callable[[Tensor, Tensor], Tensor]
Vectors = dict[str, Tensor]


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
    parts = model.split(V)
    return torch.cat([parts[name].flatten(1) for name in names], dim=1)


def matrices(model: ihvp.InfluenceModel, z: Tensor, names: Iterable[str]) -> Vectors:
    """The way back, with zeros for the parameters that are not named."""
    names = list(names)
    sizes = check_factors(model, z, names)
    given = dict(zip(names, z.to(model.device, model.dtype).split(sizes, dim=1), strict=True))
    own = {
        key: given[key].unflatten(1, p.shape)
        if key in given
        else torch.zeros(len(z), *p.shape, dtype=model.dtype, device=model.device)
        for key, p in model.weights.items()
    }
    return {name: layer.join(own) for name, layer in model.layers.items()}


def check_factors(model: ihvp.InfluenceModel, z: Tensor, names: Iterable[str]) -> list[int]:
    """The sizes of the named parameters, which together are the columns of z."""
    sizes = [model.weights[name].numel() for name in names]
    if z.dim() != 2 or z.shape[1] != sum(sizes):
        raise ValueError(f"factors must be (n,p) with p={sum(sizes)}, got {tuple(z.shape)}")
    return sizes
