"""Logistic regression that is fitted to the last digit, so that leaving examples out can be done by fitting again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ihvp import Batch, InfluenceModel
from nets import F64
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

TRAIN, TEST = 200, 60


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    """(N,1) logits, (N,) targets of 0 and 1 -> (N,)."""
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")


@dataclass(frozen=True)
class Regression:
    """(1/N) sum_n L_n(theta) + l2 / 2 ||theta||^2 over 200 examples. Leaving examples out takes their terms away.

    The l2 term is no example's, so it stays whole: the Hessian is that of the mean loss, F, plus l2 I.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    l2: float

    def fit(self, left_out: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """theta (31,), by Newton's method, without the examples `left_out`."""
        kept = torch.ones(TRAIN, dtype=F64)
        if left_out is not None:
            kept[left_out] = 0
        X = with_one(self.x)
        theta = torch.zeros(X.shape[1], dtype=F64) if start is None else start
        for _ in range(40):
            p = (X @ theta).sigmoid()
            gradient = X.T @ (kept * (p - self.y)) / TRAIN + self.l2 * theta
            H = (X.T * (kept * p * (1 - p))) @ X / TRAIN + self.l2 * torch.eye(len(theta), dtype=F64)
            step = torch.linalg.solve(H, gradient)
            # Newton's step is too long where the loss is flat; this logistic loss is self-concordant enough to damp it.
            theta = theta - step / (1 + max(0.0, float((gradient @ step).sqrt()) - 0.5))
            if float(gradient.norm()) < 1e-13:
                return theta
        raise AssertionError(f"Newton's method stopped at a gradient of {float(gradient.norm()):.1e}")

    def test_losses(self, theta: Tensor) -> Tensor:
        return logistic((with_one(self.test_x) @ theta)[:, None], self.test_y)

    def model(self, theta: Tensor) -> InfluenceModel:
        net = nn.Linear(self.x.shape[1], 1).double()
        with torch.no_grad():
            net.weight.copy_(theta[None, :-1])
            net.bias.copy_(theta[-1:])
        return InfluenceModel(net, logistic, progress=False)

    def group(self, indices: Tensor) -> list[Batch]:
        return [Batch(args=(self.x[indices],), targets=self.y[indices])]

    @property
    def train(self) -> list[Batch]:
        return [batch for i in torch.arange(TRAIN).split(64) for batch in self.group(i)]

    @property
    def test(self) -> list[Batch]:
        return [Batch(args=(self.test_x,), targets=self.test_y)]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def breast_cancer(l2: float = 1e-2) -> Regression:
    data = load_breast_cancer()
    x, y = torch.as_tensor(data.data, dtype=F64), torch.as_tensor(data.target, dtype=F64)
    at = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[at], y[at]
    x = (x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)
    return Regression(x[:TRAIN], y[:TRAIN], x[TRAIN : TRAIN + TEST], y[TRAIN : TRAIN + TEST], l2)
