"""How far an example is from the decision boundary: in its input, or in the weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import SelfInfluenceCalculator
from ihvp.calculators.functional import call, displaced
from ihvp.calculators.perturbation import input_of
from ihvp.capture import differentiable
from ihvp.model import InfluenceModel

Logits = Callable[..., Tensor]
"""(displacement of one example, its tensors ...) -> its logits (1,C)."""


class BoundaryCalculator(SelfInfluenceCalculator):
    """Minus the length of the shortest displacement found that changes the predicted class, by DeepFool.

    Each step goes to the nearest of the other classes' boundaries as the logits' gradients see them. A wrongly
    labelled or untypical example lies close, so its value is high. An example for which no boundary was reached has
    the value -inf.

    Args:
        model: the InfluenceModel of a net that returns logits (N,C).
        train_loader: training data, where a method is not given any.
        steps: at most so many.
        eps: two logits that differ by no more count as equal, and the boundary as reached.
        chunk: examples that are moved at once, each with C gradients in memory.

    Source: Moosavi-Dezfooli et al. 2016 (arXiv:1511.04599), algorithm 2, without overshoot.
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any] | None = None,
        *,
        steps: int = 100,
        eps: float = 1e-6,
        chunk: int = 64,
    ) -> None:
        for name, value in (("steps", steps), ("chunk", chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps!r}")
        super().__init__(model, train_loader)
        self.steps, self.eps, self.chunk = steps, eps, chunk

    @abstractmethod
    def _displaced(self, batch: Batch, index: int) -> tuple[Callable[[Batch, Tensor], Any], Tensor]:
        """The net's outputs as a function of (batch of one example, its displacement), and no displacement (N,D)."""

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        with differentiable(self.model):
            batch = batch.outside_inference()
            outputs, zero = self._displaced(batch, index)
            if batch.size == 0:
                return zero.new_empty(0)
            tensors: list[Tensor] = []

            def collect(x: Tensor) -> Tensor:
                tensors.append(x)
                return x

            batch.map(collect)

            def logits(moved: Tensor, *own: Tensor) -> Tensor:
                rest = iter(own)
                value = outputs(batch.map(lambda _: next(rest).unsqueeze(0)), moved)
                if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] < 2:
                    what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"the net must return logits (N,C) of 2 classes or more, got {what} for N=1")
                return value.squeeze(0)

            parts = zip(*(x.split(self.chunk) for x in (zero, *tensors)), strict=True)
            found = [self._distances(logits, *part) for part in parts]
        return -torch.cat(found).to(self.model.dtype)

    def _distances(self, logits: Logits, moved: Tensor, *tensors: Tensor) -> Tensor:
        """(B,) lengths of the displacements (B,D) that reach the boundary, inf where none was found."""
        value_of = torch.vmap(logits, randomness="same")
        jacobian_of = torch.vmap(torch.func.jacrev(logits), randomness="same")
        value = value_of(moved, *tensors)
        predicted = value.argmax(1, keepdim=True)
        others = torch.ones_like(value, dtype=torch.bool).scatter_(1, predicted, False)
        for step in range(self.steps + 1):
            gap = value - value.gather(1, predicted)
            reached = (gap >= -self.eps).logical_and(others).any(1)
            if step == self.steps or bool(reached.all()):
                break
            J = jacobian_of(moved, *tensors)
            slope = J - J.take_along_dim(predicted.unsqueeze(2), dim=1)
            norms = slope.norm(dim=2)
            distance = torch.where(others & (norms > 0), gap.abs() / norms, torch.inf)
            length, nearest = distance.min(1, keepdim=True)
            going = ~reached.unsqueeze(1) & length.isfinite()
            if not bool(going.any()):
                break
            direction = (slope / norms.unsqueeze(2)).take_along_dim(nearest.unsqueeze(2), dim=1).squeeze(1)
            moved = torch.where(going, moved + length * direction, moved)
            value = value_of(moved, *tensors)
        return torch.where(reached, moved.norm(dim=1), torch.inf)


class SampleBoundaryCalculator(BoundaryCalculator):
    """Boundary-based influence by sample: the model's first argument is displaced. All else as BoundaryCalculator."""

    def _displaced(self, batch: Batch, index: int) -> tuple[Callable[[Batch, Tensor], Any], Tensor]:
        def outputs(one: Batch, moved: Tensor) -> Any:
            x, with_input = input_of(one, index)
            other = with_input(x + moved.view_as(x))
            return self.model.net(*other.args, **other.kwargs)

        return outputs, torch.zeros_like(input_of(batch, index)[0]).flatten(1)


class WeightsBoundaryCalculator(BoundaryCalculator):
    """Boundary-based influence by weights: the tracked parameters are displaced, for each example on its own.

    All else as BoundaryCalculator.
    """

    def _displaced(self, batch: Batch, index: int) -> tuple[Callable[[Batch, Tensor], Any], Tensor]:
        model = self.model
        shapes = {name: layer.shape for name, layer in model.layers.items()}

        def outputs(one: Batch, moved: Tensor) -> Any:
            parts = moved.split([O * I for O, I in shapes.values()])
            step = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            return call(model, one, displaced(model, step))

        return outputs, torch.zeros(batch.size, model.nb_params, dtype=model.dtype, device=model.device)
