"""Sign and scale of scores, against retraining."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense_problem import DAMPING, Dense, everything
from ihvp import Batch, ExactIHVP, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel, Order
from nets import F64, METHODS, assert_near, batches, cross_entropy, gradients, rows, squared_error, tokens
from torch import Tensor, nn


@pytest.mark.parametrize("normalize", [False, True, "loss"])
def test_sign_flips_everything(normalize: bool | str) -> None:
    dense = Dense("pooled", "ekfac", normalize=normalize)
    plus = everything(dense.calculator, dense.data)
    minus = everything(
        FirstOrderInfluenceCalculator(
            dense.model, dense.train, dense.calculator.curvature, normalize=normalize, sign="loss_change"
        ),
        dense.data,
    )
    for name, value in plus.items():
        want = -value.flip(-1) if "top_k" in name else -value
        assert torch.equal(minus[name], want), name
    assert (plus["self_scores"] > 0).all()


def test_best_first_follows_the_sign() -> None:
    dense = Dense("tokens", "ekfac")
    other = FirstOrderInfluenceCalculator(dense.model, dense.train, dense.calculator.curvature, sign="loss_change")
    for one, flipped in zip(
        dense.calculator.top_k(dense.data.tests, k=4, order=Order.DESCENDING),
        other.top_k(dense.data.tests, k=4, order=Order.ASCENDING),
        strict=True,
    ):
        assert torch.equal(one[1], -flipped[1]) and torch.equal(one[2], flipped[2])


@pytest.mark.parametrize("normalize", [False, True, "theta", "loss"])
@pytest.mark.parametrize("method", METHODS)
def test_a_zero_gradient_has_the_score_zero(method: str, normalize: bool | str) -> None:
    """An example of weight 0, and one that is padding from end to end."""
    data = tokens()
    weights = torch.ones(29, dtype=F64)
    weights[4] = 0
    mask = data.train.mask.clone()
    mask[11] = False
    train = replace(data.train, weights=weights, mask=mask)
    model = data.model()
    curvature = METHODS[method](model, [train], damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, batches(train, 8), curvature, normalize=normalize)
    for scores in (calculator.scores(data.tests), calculator.self_scores()):
        assert scores.isfinite().all()
        assert (scores[..., [4, 11]] == 0).all()
        assert (scores[..., [0, 3, 5, 10, 12]] != 0).all()
    (value,) = calculator.estimate_influence_values_group([[rows(train, slice(4, 5))]])
    assert value == 0


def test_influence_is_exact_leave_one_out_for_ridge_regression() -> None:
    """Least squares with ridge lambda: removing example i moves a prediction f(x_q) by exactly

        f_-i(x_q) - f(x_q) = x_q^T H^-1 g_i / (1 - h_i),   H = X^T X + lambda I,   h_i = x_i^T H^-1 x_i,

    with g_i = -r_i x_i and r_i the residual. The calculator's curvature is that of the mean loss, (1/N) X^T X, whence
    damping = lambda / N and the factor 1/N; a query whose target is f(x_q) - 1 has the gradient x_q of its prediction.
    1 / (1 - h_i) is the leverage that first-order influence leaves out; r_i^2 h_i N is the self-influence.
    """
    torch.manual_seed(0)
    N, Q, ridge = 23, 4, 0.7
    x, x_q = torch.randn(N, 5, dtype=F64), torch.randn(Q, 5, dtype=F64)
    y = x @ torch.randn(5, dtype=F64) + torch.randn(N, dtype=F64)
    X, X_q = (torch.cat([z, torch.ones(len(z), 1, dtype=F64)], dim=1) for z in (x, x_q))

    def fitted(rows: Tensor) -> Tensor:
        H = X[rows].T @ X[rows] + ridge * torch.eye(6, dtype=F64)
        return torch.linalg.solve(H, X[rows].T @ y[rows])

    everything = torch.arange(N)
    theta = fitted(everything)
    net = nn.Linear(5, 1).double()
    with torch.no_grad():
        net.weight.copy_(theta[None, :-1])
        net.bias.copy_(theta[-1:])
    model = InfluenceModel(net, squared_error, progress=False)
    train = batches(Batch(args=(x,), targets=y[:, None]), 8)
    queries = Batch(args=(x_q,), targets=(X_q @ theta - 1)[:, None])
    curvature = ExactIHVP(model, train, damping=ridge / N)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature)
    H = X.T @ X + ridge * torch.eye(6, dtype=F64)
    leverage = (X * torch.linalg.solve(H, X.T).T).sum(1)
    assert_near(calculator.self_scores() / N, (y - X @ theta).square() * leverage)
    predicted = calculator.scores([queries]) / N / (1 - leverage)
    left_out = torch.stack([X_q @ (fitted(everything[everything != i]) - theta) for i in range(N)], dim=1)
    assert_near(predicted, left_out)


def test_a_proponent_lowers_the_querys_loss() -> None:
    """One small step on a training example changes each query's loss by - step x score, identity curvature."""
    dense = Dense("tokens", "identity")
    model, step = dense.model, 1e-6
    calculator = FirstOrderInfluenceCalculator(model, dense.train, IdentityIHVP(model))
    scores = calculator.scores(dense.data.tests[:1])
    query = dense.data.tests[0]

    def query_losses() -> Tensor:
        return torch.where(query.mask, cross_entropy(model.net(*query.args), query.targets), 0).sum(1).detach()

    before = query_losses()
    g = gradients(model, rows(dense.data.train, slice(3, 4)))
    with torch.no_grad():
        for name, layer in model.layers.items():
            for key, value in layer.split(g[name][0]).items():
                model.weights[key] -= step * value
    assert_near((before - query_losses()) / step, scores[:, 3], 1e-4)
