"""The proximal Bregman response: its closed form where there is one, and the influence that it goes to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import (
    EKFACIHVP,
    Batch,
    ConvergenceError,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    Order,
    ProximalBregmanCalculator,
)
from nets import F64, PROBLEMS, Problem, assert_near, batches, plain, rows, squared_error
from torch import Tensor, nn

DAMPING = 0.1


def influence(model: InfluenceModel, train: list[Batch]) -> FirstOrderInfluenceCalculator:
    curvature = ExactIHVP(model, train, damping=DAMPING, curvature="gauss_newton")
    return FirstOrderInfluenceCalculator(model, train, curvature)


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_goes_to_gauss_newton_influence_as_the_weight_goes_to_zero(name: str) -> None:
    """At weights that are no minimum of anything; the error falls with the weight."""
    data = PROBLEMS[name](11)
    model, train = data.model(), batches(data.train, 4)
    want = influence(model, train)
    for got, reference in ((lambda one: one.scores(data.tests), want), (lambda one: one.self_scores(), want)):
        truth = got(reference)
        large, small = (
            float((got(ProximalBregmanCalculator(model, train, train, DAMPING, weight)) - truth).norm() / truth.norm())
            for weight in (1e-2, 1e-3)
        )
        assert small < 0.02
        assert 0.05 * large < small < 0.2 * large


def linear(N: int = 9) -> tuple[Problem, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2, bias=False).double()
    x, y = torch.randn(N, 3, dtype=F64), torch.randn(N, 2, dtype=F64)
    query = Batch(args=(torch.randn(4, 3, dtype=F64),), targets=torch.randn(4, 2, dtype=F64))
    return Problem(net, squared_error, Batch(args=(x,), targets=y), (query,)), x, y


@pytest.mark.parametrize("weight", [None, 0.7, -0.02])
def test_a_linear_net_with_squared_error_in_closed_form(weight: float | None) -> None:
    data, x, y = linear()
    w = -1 / 9 if weight is None else weight
    W = data.net.weight.detach()
    (query,) = data.tests

    def losses(W: Tensor) -> Tensor:
        return squared_error(query.args[0] @ W.T, query.targets)

    eye, want = torch.eye(3, dtype=F64), []
    for n in range(9):
        near = x.T @ x / 9 + DAMPING * eye
        moved = torch.linalg.solve(near + w * x[n].outer(x[n]), near @ W.T + w * x[n].outer(y[n])).T
        want.append(-(losses(moved) - losses(W)) / w)
    truth = torch.stack(want, dim=1)
    train = batches(data.train, 4)
    calculator = ProximalBregmanCalculator(data.model(), train, train, DAMPING, weight, tolerance=1e-6)
    assert_near(calculator.scores([query]), truth, 1e-5)
    [(_, values, indices)] = calculator.top_k([query], k=2, order=Order.ASCENDING)
    assert_near(values, truth.sort(1).values[:, :2], 1e-5)
    assert torch.equal(indices, truth.argsort(1)[:, :2])
    turned = ProximalBregmanCalculator(data.model(), train, train, DAMPING, weight, "loss_change", tolerance=1e-6)
    assert_near(turned.scores([query]), -truth, 1e-5)


def test_ekfac_predicts_it_better_than_plain_dot_products() -> None:
    """For the weight that takes an example out."""
    data = plain(40)
    model, train = data.model(), batches(data.train, 10)
    response = ProximalBregmanCalculator(model, train, train, DAMPING).scores(data.tests)

    def correlation(curvature: Any) -> float:
        scores = FirstOrderInfluenceCalculator(model, train, curvature).scores(data.tests)
        return float(torch.corrcoef(torch.stack([scores.flatten(), response.flatten()]))[0, 1])

    ekfac = correlation(EKFACIHVP(model, train, damping=DAMPING))
    assert ekfac > 0.9
    assert ekfac > correlation(IdentityIHVP(model))


def test_float32_nets_are_read_in_float64_and_stay_as_they_are() -> None:
    data = plain(8)
    narrow = Problem(data.net.float(), data.loss_fn, data.train, data.tests)
    train = [batch.map(lambda x: x.float() if x.is_floating_point() else x) for batch in batches(data.train, 4)]
    before = {name: p.clone() for name, p in narrow.net.named_parameters()}
    got = ProximalBregmanCalculator(narrow.model(), train, train, DAMPING).self_scores()
    assert got.dtype == torch.float32
    for name, p in narrow.net.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None
    wide = [batch.map(lambda x: x.double() if x.is_floating_point() else x) for batch in train]
    assert_near(got, ProximalBregmanCalculator(narrow_as_wide(narrow), wide, wide, DAMPING).self_scores(), 1e-6)


def narrow_as_wide(data: Problem) -> InfluenceModel:
    data.net.double()
    return data.model()


def test_no_examples_and_no_queries() -> None:
    data = plain(8)
    empty = rows(data.train, slice(0))
    calculator = ProximalBregmanCalculator(data.model(), [data.train, empty], None, DAMPING)
    assert calculator.examples == 8
    assert calculator.scores(data.tests, [empty]).shape == (7, 0)
    assert calculator.scores([empty], [data.tests[1]]).shape == (0, 1)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": 0.0}, "damping must be positive, got 0.0"),
        ({"weight": 0}, "weight must be None or a number that is not zero, got 0"),
        ({"weight": "all"}, "weight must be None or a number that is not zero, got 'all'"),
        ({"max_iterations": 0}, "max_iterations must be positive, got 0"),
        ({"tolerance": -1.0}, "tolerance must be positive"),
        ({"on_failure": "hope"}, "on_failure must be one of"),
        ({"sign": "up"}, "sign must be one of"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    data = plain(8)
    with pytest.raises(ValueError, match=match):
        ProximalBregmanCalculator(data.model(), [data.train], [data.train], **options)


def test_no_data_other_outputs_and_numbers_that_are_not_finite() -> None:
    data = plain(8)
    with pytest.raises(ValueError, match="hessian_loader yielded no example"):
        ProximalBregmanCalculator(data.model(), [rows(data.train, slice(0))])

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = data.net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    pair = InfluenceModel(Pair(), lambda outputs, targets: data.loss_fn(outputs[0], targets), progress=False)
    with pytest.raises(TypeError, match="needs a net that returns one tensor, got tuple"):
        ProximalBregmanCalculator(pair, [data.train])
    calculator = ProximalBregmanCalculator(data.model(), [data.train], damping=1.0)
    wrong = Batch(args=(torch.full((2, 4), torch.inf, dtype=F64),), targets=torch.zeros(2, dtype=torch.long))
    with pytest.raises(FloatingPointError, match="the loss or its gradient in batch 1 is not finite"):
        calculator.scores([data.tests[0]], [data.tests[0], wrong])


def test_a_response_that_is_not_reached_is_said() -> None:
    data = plain(8)
    train = [data.train]
    with pytest.raises(ConvergenceError, match="batch 0, example 0: the response stopped at a relative gradient of"):
        ProximalBregmanCalculator(data.model(), train, train, max_iterations=1, on_failure="raise").self_scores()
    ProximalBregmanCalculator(data.model(), train, train, max_iterations=1, on_failure="return").self_scores()
