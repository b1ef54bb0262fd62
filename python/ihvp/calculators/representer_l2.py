"""Representer points: a net's last layer under l2 regularisation as a sum over the training examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.calculators.base import InfluenceCalculator
from ihvp.calculators.checkpoints import weights_of
from ihvp.calculators.first_order import FirstOrderInfluenceCalculator
from ihvp.calculators.head import head_of, largest_logit
from ihvp.capture import capture
from ihvp.methods.identity import IdentityIHVP
from ihvp.methods.queries import Queries, written_out
from ihvp.model import InfluenceModel, Layer, LossFn

STATIONARY = 1e-6  # of the gradient, relative to that of the l2 term


class RepresenterPointL2(InfluenceCalculator[Queries]):
    """Representer point selection. The last layer W (O,I') is fitted anew, from the net's own, to

        (1/N) sum_n L_n(W) + l2 ||W||^2,

    whence W = sum_n alpha_n f_n^T with alpha_n = - delta_n / (2 l2 N), f_n the layer's input (with the bias feature)
    and delta_n the gradient at its output. The score of training example n for query q is its part of q's measurement,
    by default of the logit of the class that the refitted net predicts: alpha_n[c] f_n^T f_q. The scores of a query sum
    to that logit. With sign="proponent" a positive score raises it. The self-influence is |alpha_n[c]|, c the class
    predicted for n.

    Args:
        model: an InfluenceModel that tracks the net's last layer alone, an nn.Linear; the net is not changed.
        train_loader: all training data; their features are held in memory in float64 during the fit.
        l2: the strength, positive.
        sign: "proponent" or "loss_change".
        measurement: (outputs, targets) -> (N,) or (N,T).

    Raises:
        ValueError: another layer is tracked, or the tracked one is not the net's last operation.
        RuntimeError: the fit did not become stationary.

    Source: Yeh et al. 2018 (arXiv:1811.09720), theorem 3.1.
    """

    def __init__(
        self,
        model: InfluenceModel,
        train_loader: Iterable[Any],
        l2: float,
        sign: str = "proponent",
        *,
        measurement: LossFn = largest_logit,
    ) -> None:
        if isinstance(l2, bool) or not isinstance(l2, (int, float)) or not 0 < l2 < float("inf"):
            raise ValueError(f"l2 must be a positive number, got {l2!r}")
        super().__init__(model, train_loader, sign)
        head = head_of(model)
        W, examples = _fit(model, head, train_loader, float(l2))
        self.l2 = float(l2)
        self.weights = head.split(W)
        self.measurement = measurement
        self._scale = -1 / (2 * self.l2 * examples)
        self._dots = FirstOrderInfluenceCalculator(model, None, IdentityIHVP(model), measurement=measurement)

    def _ready(self, batch: Batch, index: int) -> Queries:
        with weights_of(self.model.net, self.weights):
            return self._dots._ready(batch, index)

    def _joined(self, parts: Sequence[Queries]) -> Queries:
        return self._dots._joined(parts)

    def _scored(self, queries: Queries, batch: Batch, index: int) -> Tensor:
        with weights_of(self.model.net, self.weights):
            return self._scale * self._dots._scored(queries, batch, index)

    def _self_values(self, batch: Batch, index: int) -> Tensor:
        found: list[Tensor] = []
        with weights_of(self.model.net, self.weights):
            for measurement in (None, self.measurement):
                capture(
                    self.model,
                    batch,
                    lambda layer, a, delta, mask: found.append(delta),
                    index=index,
                    measurement=measurement,
                )
        delta, chosen = found
        return (self._scale * delta * chosen).flatten(1).sum(1).abs().to(self.model.dtype)


def _fit(model: InfluenceModel, head: Layer, loader: Iterable[Any], l2: float) -> tuple[Tensor, int]:
    """(W, N): the stationary point in float64, and the number of examples."""
    parts: list[tuple[Batch, Tensor, torch.Size]] = []
    for index, (_, batch) in enumerate(model.passes(loader, "features")):
        parts.append((batch, *_features(model, head, batch, index)))
    N = sum(batch.size for batch, _, _ in parts)
    W = head.matrix().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [W], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        total = l2 * W.square().sum()
        for batch, x, shape in parts:
            outputs = (x @ W.mT).view(shape)
            total = total + model.losses(outputs, batch, batch.targets).sum() / N
        optimizer.zero_grad()
        total.backward()
        return total

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(objective)
        objective()
    assert W.grad is not None
    residual = float(W.grad.norm() / (2 * l2 * W.detach().norm()))
    if not residual <= STATIONARY:
        raise RuntimeError(
            f"the refit of layer {head.name!r} stopped at a relative gradient of {residual:.1e}, not within "
            f"{STATIONARY:.0e} of stationary; a larger l2 helps"
        )
    return W.detach(), N


def _features(model: InfluenceModel, head: Layer, batch: Batch, index: int) -> tuple[Tensor, torch.Size]:
    """The head's input (N,T,I') in float64 with the bias feature, and the shape of the net's outputs."""
    found: list[Tensor] = []
    capture(model, batch, lambda layer, a, delta, mask: found.append(written_out(layer, a)), index=index)
    with torch.no_grad():
        outputs = model.net(*batch.args, **batch.kwargs)
    expected = found[0] @ head.matrix().mT
    if (
        not isinstance(outputs, Tensor)
        or outputs.numel() != expected.numel()
        or not torch.allclose(outputs.reshape(expected.shape), expected, rtol=1e-3, atol=1e-4)
    ):
        raise ValueError(f"layer {head.name!r} is not the net's last operation: its output is not what the net returns")
    return found[0].double(), outputs.shape
