"""Representer points: their parts sum to the logits, and are those of a loop written from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ihvp import Batch, ExactIHVP, FisherIHVP, InfluenceModel, RepresenterPointL2, RepresenterPointLJE
from nets import (
    F32,
    F64,
    Problem,
    assert_near,
    batches,
    cross_entropy,
    hessian,
    plain,
    second_derivative,
    squared_error,
    tokens,
)
from torch import Tensor, nn

L2 = 0.05
STATIONARY = 1e-5  # of the refit: what the parts owe the whole; the fit stops at a relative gradient of 1e-6


def features(data: Problem, batch: Batch, model: InfluenceModel) -> Tensor:
    """Inputs of the last layer, with the 1 of a bias."""
    f = data.net[:-1](batch.args[0]).detach()
    return torch.cat([f, f.new_ones(*f.shape[:-1], 1)], dim=-1) if model.layers["2"].bias else f


def refitted(model: InfluenceModel, f: Tensor, targets: Tensor) -> Tensor:
    """The l2-regularised last layer by Newton's method on the dense Hessian."""
    W = model.layers["2"].matrix().double()

    def objective(flat: Tensor) -> Tensor:
        return model.loss_fn(f @ flat.view(W.shape).T, targets).mean() + L2 * flat.square().sum()

    flat = W.flatten().clone()
    for _ in range(30):
        step = torch.linalg.solve(second_derivative(objective)(flat), torch.func.grad(objective)(flat))
        flat = flat - step
    return flat.view(W.shape)


def naive_l2(model: InfluenceModel, f: Tensor, targets: Tensor, f_q: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, self-influence) by loops over the pairs."""
    W = refitted(model, f, targets)
    N = len(f)
    scores, own = torch.zeros(len(f_q), N, dtype=F64), torch.zeros(N, dtype=F64)
    for n in range(N):
        phi = (W @ f[n]).requires_grad_()
        (slope,) = torch.autograd.grad(model.loss_fn(phi[None], targets[n : n + 1]).sum(), phi)
        alpha = -slope / (2 * L2 * N)
        own[n] = alpha[phi.argmax()].abs()
        for q, x in enumerate(f_q):
            scores[q, n] = alpha[(W @ x).argmax()] * (f[n] @ x)
    return scores, own


def test_l2_against_a_loop() -> None:
    data = plain()
    model = data.model(start_layer=-1)
    f = features(data, data.train, model)
    f_q = torch.cat([features(data, batch, model) for batch in data.tests])
    before = {key: x.clone() for key, x in data.net.state_dict().items()}
    calculator = RepresenterPointL2(model, batches(data.train, 8), L2)
    want, own = naive_l2(model, f, data.train.targets, f_q)
    assert_near(calculator.scores(data.tests), want, STATIONARY)
    assert_near(calculator.self_scores(), own, STATIONARY)
    values, indices = calculator.compute_top_k_from_training_dataset(k=4)
    assert_near(values, own.topk(4).values, STATIONARY)
    assert torch.equal(indices, own.topk(4).indices)
    assert all(torch.equal(x, before[key]) for key, x in data.net.state_dict().items())


def test_l2_parts_sum_to_the_logits() -> None:
    """With a bias, which is regularised as the weight of a feature 1; with padding, whose logits are not data."""
    data = tokens()
    model = data.model(start_layer=-1)
    calculator = RepresenterPointL2(model, batches(data.train, 8), L2)
    W = torch.cat([calculator.weights["2.weight"], calculator.weights["2.bias"][:, None]], dim=1)
    for batch in data.tests:
        logits = (features(data, batch, model) @ W.T).amax(2)
        want = torch.where(batch.mask, logits, 0).sum(1)
        assert_near(calculator.scores([batch]).sum(1), want, STATIONARY)


def test_l2_of_another_measurement_and_sign() -> None:
    data = plain()
    model = data.model(start_layer=-1)
    calculator = RepresenterPointL2(
        model, [data.train], L2, "loss_change", measurement=lambda outputs, targets: outputs[:, 0]
    )
    (W,) = calculator.weights.values()
    want = features(data, data.tests[2], model) @ W[0]
    assert_near(calculator.scores(data.tests[2:]).sum(1), -want, STATIONARY)


def test_l2_in_float32() -> None:
    data = plain()
    want = RepresenterPointL2(data.model(start_layer=-1), [data.train], L2).scores(data.tests)
    data.net.float()
    train, *tests = (Batch(args=(b.args[0].float(),), targets=b.targets) for b in (data.train, *data.tests))
    found = RepresenterPointL2(data.model(start_layer=-1), [train], L2).scores(tests)
    assert found.dtype == F32
    assert_near(found.double(), want, 1e-4)


def ridge() -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def data(N: int) -> Batch:
        return Batch(args=(torch.randn(N, 4, dtype=F64),), targets=torch.randn(N, 2, dtype=F64))

    return Problem(net, squared_error, data(30), (data(4),))


def test_l2_of_ridge_regression_is_the_closed_form() -> None:
    """alpha_n = r_n / (2 l2 N), r_n the residual of (F^T F / N + 2 l2 I)^-1 F^T Y / N."""
    data = ridge()
    model = data.model(start_layer=-1)
    f, f_q = (features(data, batch, model) for batch in (data.train, data.tests[0]))
    y = data.train.targets
    W = torch.linalg.solve(f.T @ f / 30 + 2 * L2 * torch.eye(6, dtype=F64), f.T @ y / 30).T
    alpha = (y - f @ W.T) / (2 * L2 * 30)
    calculator = RepresenterPointL2(model, [data.train], L2, measurement=lambda outputs, targets: outputs[:, 1])
    assert_near(calculator.scores(data.tests), (f_q @ f.T) * alpha[:, 1], STATIONARY)
    assert_near(calculator.self_scores(), alpha[:, 1].abs(), STATIONARY)


# --- local Jacobian expansion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_lje_against_a_loop(damping: float) -> None:
    data = plain()
    model = data.model(start_layer=-1)
    curvature = ExactIHVP(model, [data.train], damping=damping)
    calculator = RepresenterPointLJE(model, batches(data.train, 8), curvature)
    f = features(data, data.train, model)
    f_q = torch.cat([features(data, batch, model) for batch in data.tests])
    W = model.layers["2"].matrix()
    head = Problem(nn.Sequential(nn.Identity(), nn.Identity(), data.net[-1]), cross_entropy, data.train, ())
    H = hessian(head.model(), Batch(args=(f,), targets=data.train.targets))
    inverse = torch.linalg.inv(H + damping * torch.eye(len(H), dtype=F64))
    scores, own = torch.zeros(len(f_q), 29, dtype=F64), torch.zeros(29, dtype=F64)
    for n in range(29):
        phi = (W @ f[n]).requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(phi[None], data.train.targets[n : n + 1]).sum(), phi)
        step = (inverse @ torch.outer(slope, f[n]).flatten()).view(W.shape)
        own[n] = (step @ f[n])[phi.argmax()].abs() / 29
        for q, x in enumerate(f_q):
            scores[q, n] = ((W - step) @ x)[(W @ x).argmax()] / 29
    assert_near(calculator.scores(data.tests), scores)
    assert_near(calculator.self_scores(), own)


def test_lje_parts_sum_to_the_logits_after_a_newton_step() -> None:
    """For squared error one Newton step is the stationary point itself: the ridge regression's prediction."""
    data = ridge()
    model = data.model(start_layer=-1)
    calculator = RepresenterPointLJE(
        model,
        [data.train],
        ExactIHVP(model, [data.train]),
        measurement=lambda outputs, targets: outputs[:, 0],
    )
    f, f_q = (features(data, batch, model) for batch in (data.train, data.tests[0]))
    W = torch.linalg.lstsq(f, data.train.targets).solution.T
    assert_near(calculator.scores(data.tests).sum(1), f_q @ W[0], 1e-9)


def test_lje_with_any_curvature_and_sign() -> None:
    data = tokens()
    model = data.model(start_layer=-1)
    plus, minus = (
        RepresenterPointLJE(model, [data.train], FisherIHVP(model, damping=0.5), sign)
        for sign in ("proponent", "loss_change")
    )
    assert torch.equal(plus.scores(data.tests), -minus.scores(data.tests))
    assert torch.equal(plus.self_scores(), -minus.self_scores()) and (plus.self_scores() > 0).all()


# --- bad input ---------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(x)


def both(model: InfluenceModel, train: Any) -> list[Callable[[], Any]]:
    return [
        lambda: RepresenterPointL2(model, train, L2),
        lambda: RepresenterPointLJE(model, train, FisherIHVP(model, train)),
    ]


def test_wrong_layers() -> None:
    data = plain()
    for call in both(data.model(), [data.train]):
        with pytest.raises(ValueError, match=r"must track the last linear layer alone.*'0' \(Linear\), '2' \(Linear\)"):
            call()
    with pytest.raises(ValueError, match="layer '0' is not the net's last operation"):
        RepresenterPointL2(data.model(last_layer=0), [data.train], L2)
    train = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    with pytest.raises(ValueError, match="layer 'head' is not the net's last operation"):
        RepresenterPointL2(InfluenceModel(Scaled(), cross_entropy, progress=False), train, L2)


@pytest.mark.parametrize("l2", [0, -1.0, float("nan"), "0.1", None])
def test_wrong_strengths(l2: Any) -> None:
    data = plain()
    with pytest.raises(ValueError, match="l2 must be a positive number"):
        RepresenterPointL2(data.model(start_layer=-1), [data.train], l2)


def test_a_refit_that_does_not_become_stationary() -> None:
    """The absolute error has kinks where the fit ends."""
    data = ridge()
    model = InfluenceModel(
        data.net, lambda outputs, targets: (outputs - targets).abs().sum(-1), start_layer=-1, progress=False
    )
    with pytest.raises(RuntimeError, match=r"refit of layer '2' stopped at a relative gradient of .*a larger l2 helps"):
        RepresenterPointL2(model, [data.train], 1e-3)
