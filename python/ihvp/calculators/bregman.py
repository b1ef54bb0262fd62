"""What influence functions approximate in a net that was not trained to convergence: the proximal Bregman response."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch, all_finite
from ihvp.calculators.base import InfluenceCalculator
from ihvp.calculators.functional import call
from ihvp.capture import untouched
from ihvp.methods.iterative import check_on_failure, check_positive, complain
from ihvp.model import InfluenceModel

Leaves = dict[str, Tensor]
"""Parameters, or their displacements, by their names in the net, in float64."""
Measured = list[tuple[Batch, Tensor]]
"""Batches of queries with their losses (B,) at the weights that the net has."""


@dataclass(frozen=True)
class _Held:
    """A batch that holds the weights, with what the net makes of it at those that it has."""

    batch: Batch
    outputs: Tensor
    losses: Tensor
    slope: Tensor  # of the losses at the outputs


class ProximalBregmanCalculator(InfluenceCalculator[Measured]):
    """The proximal Bregman response: the change of a query's loss when the weights that are near in output space, and
    near themselves, answer to example n being counted `weight` more.

        theta_n = argmin (1/N) sum_i D(y_i(theta), y_i(theta_0)) + damping/2 |theta - theta_0|^2 + weight loss_n(theta)
        score   = -(loss_q(theta_n) - loss_q(theta_0)) / weight,

    y_i being the net's outputs for example i and D the Bregman divergence of the loss as a function of them. As the
    weight goes to zero this is g_q^T (F + damping I)^-1 g_n with the Gauss-Newton matrix of a convex loss as F, at any
    weights theta_0, so it is the truth that such scores are to be judged by where training again is not. Each training
    example is a minimisation over all of `hessian_loader`: this is for a few of them.

    All is computed in float64, with the loader's batches in memory. The net must return one tensor.

    Args:
        model: the InfluenceModel; the tracked layers are those that answer.
        hessian_loader: the examples i, whose outputs hold the weights.
        train_loader: training data, where a method is not given any.
        damping: a positive number.
        weight: None: -1/N, which takes the example out of the mean.
        sign: "proponent" or "loss_change".
        max_iterations: of L-BFGS.
        tolerance: of the gradient, relative to that of loss_n. At small weights little is gained below 1e-5.
        on_failure: "warn" issues a ConvergenceWarning, "raise" raises a ConvergenceError, "return" says nothing.

    Raises:
        TypeError, ValueError: a wrong argument, named. FloatingPointError: a loss is not finite; names the batch.

    Source: Bae et al. 2022 (arXiv:2209.05364), the proximal Bregman response function.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any],
        train_loader: Iterable[Any] | None = None,
        damping: float = 1e-3,
        weight: float | None = None,
        sign: str = "proponent",
        *,
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
        on_failure: str = "warn",
    ) -> None:
        super().__init__(model, train_loader, sign)
        check_positive(damping=damping, max_iterations=max_iterations, tolerance=tolerance)
        check_on_failure(on_failure)
        if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight == 0):
            raise ValueError(f"weight must be None or a number that is not zero, got {weight!r}")
        self.damping, self.max_iterations, self.tolerance = float(damping), int(max_iterations), float(tolerance)
        self.on_failure = on_failure
        net = model.net
        self._fixed = {name: _wide(x.detach().clone()) for name, x in (*net.named_parameters(), *net.named_buffers())}
        self._start: Leaves = {name: self._fixed.pop(name) for name in model.weights}
        self._held: list[_Held] = []
        with torch.inference_mode(False), torch.enable_grad(), untouched(net):
            for index, (_, raw) in enumerate(model.passes(hessian_loader, "outputs")):
                batch = _wide_batch(raw)
                outputs = self._outputs(batch, {}).detach().requires_grad_()
                losses = self._finite(model.losses(outputs, batch, batch.targets), index)
                slope = torch.autograd.grad(losses.sum(), outputs)[0]
                self._held.append(_Held(batch, outputs.detach(), losses.detach(), slope))
        N = sum(own.batch.size for own in self._held)
        if N == 0:
            raise ValueError("hessian_loader yielded no example")
        self.examples = N
        self.weight = -1 / N if weight is None else float(weight)

    def _ready(self, batch: Batch, index: int) -> Measured:
        with torch.inference_mode(False), torch.no_grad(), untouched(self.model.net):
            wide = _wide_batch(batch)
            return [(wide, self._finite(self._losses(wide, {}), index))]

    def _joined(self, parts: Sequence[Measured]) -> Measured:
        return [one for part in parts for one in part]

    def _scored(self, queries: Measured, batch: Batch, index: int) -> Tensor:
        [(wide, _)] = self._ready(batch, index)
        Q = sum(len(losses) for _, losses in queries)
        scores = torch.zeros(Q, batch.size, dtype=self.model.dtype, device=self.model.device)
        for n in range(batch.size):
            scores[:, n] = self._changes(queries, self._response(wide, n, index))
        return scores

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        return self._scored(self._ready(batch, index), batch, index).diagonal()

    def _changes(self, queries: Measured, moves: Leaves) -> Tensor:
        """(Q,): minus the change of the queries' losses over the weight."""
        with torch.no_grad(), untouched(self.model.net):
            return torch.cat([before - self._losses(batch, moves) for batch, before in queries]) / self.weight

    def _response(self, batch: Batch, n: int, index: int) -> Leaves:
        """theta_n - theta_0, by a minimisation over the step per weight, u = (theta - theta_0) / weight."""
        u = {name: torch.zeros_like(p) for name, p in self._start.items()}
        with torch.inference_mode(False), torch.enable_grad(), untouched(self.model.net):
            for step in u.values():
                step.requires_grad_()

            def objective() -> Tensor:
                moves = {name: self.weight * step for name, step in u.items()}
                total = self._losses(batch, moves)[n] / self.weight
                for own in self._held:
                    total = total + self._divergence(own, moves) / (self.examples * self.weight**2)
                total = total + self.damping / 2 * sum(step.square().sum() for step in u.values())
                for step, g in zip(u.values(), torch.autograd.grad(total, list(u.values())), strict=True):
                    step.grad = g
                return total.detach()

            objective()
            scale = self._finite(_gradient_norm(u), index)
            if scale > 0:
                torch.optim.LBFGS(
                    list(u.values()),
                    max_iter=self.max_iterations,
                    max_eval=2 * self.max_iterations,
                    history_size=50,
                    tolerance_grad=self.tolerance * float(scale) / self.model.nb_params**0.5,
                    tolerance_change=0.0,
                    line_search_fn="strong_wolfe",
                ).step(objective)
                objective()
                residual = float(_gradient_norm(u) / scale)
                if not residual <= self.tolerance:
                    complain(
                        self.on_failure,
                        f"batch {index}, example {n}: the response stopped at a relative gradient of {residual:.1e}, "
                        f"above {self.tolerance:.0e}; more max_iterations or a larger damping help",
                    )
        return {name: self.weight * step.detach() for name, step in u.items()}

    def _divergence(self, own: _Held, moves: Leaves) -> Tensor:
        """sum_i D(y_i(theta), y_i(theta_0)), where D(y, z) = loss(y) - loss(z) - <slope of the loss at z, y - z>."""
        outputs = self._outputs(own.batch, moves)
        losses = self.model.losses(outputs, own.batch, own.batch.targets)
        return (losses - own.losses - (own.slope * (outputs - own.outputs)).flatten(1).sum(1)).sum()

    def _losses(self, batch: Batch, moves: Leaves) -> Tensor:
        losses = self.model.losses(self._outputs(batch, moves), batch, batch.targets)
        return losses

    def _outputs(self, batch: Batch, moves: Leaves) -> Tensor:
        """The net's outputs at the weights displaced by `moves`."""
        own = {name: p + moves[name] if name in moves else p for name, p in self._start.items()}
        outputs = call(self.model, batch, self._fixed | own)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the Bregman divergence needs a net that returns one tensor, got {type(outputs).__name__}")
        return outputs

    def _finite(self, x: Tensor, index: int) -> Tensor:
        if not all_finite(x):
            raise FloatingPointError(f"the loss or its gradient in batch {index} is not finite")
        return x


def _gradient_norm(u: Leaves) -> Tensor:
    norms = [torch.linalg.vector_norm(step.grad) for step in u.values() if step.grad is not None]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _wide_batch(batch: Batch) -> Batch:
    return batch.outside_inference().map(_wide)
