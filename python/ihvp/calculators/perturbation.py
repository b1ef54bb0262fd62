"""How scores change with the training inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.functional import call
from ihvp.capture import differentiable
from ihvp.methods.base import Vectors
from ihvp.model import InfluenceModel

CHUNK = 16  # queries differentiated at once


def input_gradients(model: InfluenceModel, P: Vectors, batch: Batch, *, index: int = 0) -> Tensor:
    """(Q,N,*x): the derivative of <P_q, g_n> with respect to the input x_n, by reverse over reverse differentiation.

    The input is the model's first argument, x (N,*). The gradient of the batch's summed loss is differentiated once,
    and pulled back for CHUNK queries at a time.

    Args:
        P: layer name -> (Q,O,I').
        index: number of the batch, for errors.

    Returns:
        (Q,N,*x), in the dtype of x.

    Raises:
        TypeError: the input is not a floating-point tensor, as token numbers are not.
        ValueError: the first dimension of the input is not the example.

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 5.
    """
    with differentiable(model):
        batch = batch.outside_inference()
        x, with_input = input_of(batch, index)
        weights = {name: p.detach() for name, p in model.weights.items()}

        def gradient(x: Tensor) -> dict[str, Tensor]:
            own = with_input(x)

            def loss(weights: dict[str, Tensor]) -> Tensor:
                return model.losses(call(model, own, weights), own, own.targets).sum()

            found: dict[str, Tensor] = torch.func.grad(loss)(weights)
            return found

        pull_back = torch.func.vjp(gradient, x)[1]
        directions = {key: p.to(weights[key].dtype) for key, p in model.split(P).items()}
        if not len(next(iter(P.values()))):
            return x.new_zeros(0, *x.shape)
        pulled = torch.vmap(lambda one: pull_back(one)[0], chunk_size=CHUNK, randomness="same")
        found: Tensor = pulled(directions)
        return found.detach()


def input_of(batch: Batch, index: int) -> tuple[Tensor, Callable[[Tensor], Batch]]:
    """The model's first argument, and the batch with another in its place. `index` names the batch in errors."""
    names = ["args[0]"] if batch.args else [f"kwargs[{key!r}]" for key in batch.kwargs][:1]
    x = next(iter(batch.args or batch.kwargs.values()), None)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"batch {index}: {''.join(names) or 'the input'} must be a floating-point tensor to be differentiated by, "
            f"got {what}"
        )
    if x.dim() == 0 or x.shape[0] != batch.size:
        raise ValueError(f"batch {index}: {names[0]} must be (N,*) with N={batch.size}, got {tuple(x.shape)}")

    def with_input(value: Tensor) -> Batch:
        if batch.args:
            return replace(batch, args=(value, *batch.args[1:]))
        return replace(batch, kwargs={**batch.kwargs, next(iter(batch.kwargs)): value})

    return x, with_input
