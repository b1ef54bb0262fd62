"""Influence of groups to second order: against the formula, and against fitting again without the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ihvp import (
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    SecondOrderInfluenceCalculator,
    make_ihvp,
)
from nets import F64, METHODS, PROBLEMS, assert_near, batches, flat, gradients, plain, rows
from regressions import TRAIN, breast_cancer
from torch import Tensor

DAMPING = 0.3
GROUPS = (slice(0, 3), slice(3, 14))


EVERY = [(method, "plain", "proponent") for method in METHODS]
MORE = [(method, name, "loss_change") for name in ("tokens", "pooled") for method in ("ekfac", "hessian")]


@pytest.mark.parametrize(("method", "name", "sign"), EVERY + MORE)
def test_the_formula(method: str, name: str, sign: str) -> None:
    data, own = PROBLEMS[name](), METHODS[method]
    model = data.model()
    train = batches(data.train, 8)
    calculator = SecondOrderInfluenceCalculator(model, train, own(model, train, damping=DAMPING), sign)
    groups = [rows(data.train, at) for at in GROUPS]
    H = own.damped(model, data.train, DAMPING)
    tests = [[data.tests[0]], list(data.tests[1:])]
    found = list(calculator.estimate_influence_parts_group([batches(group, 5) for group in groups], tests))
    totals = calculator.estimate_influence_values_group([batches(group, 5) for group in groups], tests)
    for group, test, parts, total in zip(groups, tests, found, totals, strict=True):
        p = group.size / 29
        t = torch.cat([flat(gradients(model, batch)) for batch in test]).sum(0)
        P = torch.linalg.solve(H, flat(gradients(model, group)).sum(0))
        factor = (1 if sign == "proponent" else -1) / (1 - p) ** 2
        first = factor * (1 - 2 * p) * t @ P
        second = factor * p * t @ torch.linalg.solve(H, own.F(model, group) @ P)
        assert_near(parts.first_order, first.view(1, 1))
        assert_near(parts.second_order, second.view(1, 1))
        assert_near(total, (first + second).view(1, 1))


def test_a_group_meets_itself_when_no_other_is_given() -> None:
    data = plain()
    model = data.model()
    calculator = SecondOrderInfluenceCalculator(model, [data.train], IdentityIHVP(model))
    group = batches(rows(data.train, slice(6)), 4)
    (one,), (other,) = (list(calculator.estimate_influence_values_group(*own)) for own in (([group],), ([group],) * 2))
    assert torch.equal(one, other) and one > 0


def test_small_groups_have_the_first_order_influence() -> None:
    """p = 1 / N: the terms in p are of its order."""
    data = plain(400)
    model = data.model()
    curvature = ExactIHVP(model, [data.train], damping=1.0)
    group = [rows(data.train, slice(1))]
    second = SecondOrderInfluenceCalculator(model, [data.train], curvature)
    first = FirstOrderInfluenceCalculator(model, [data.train], curvature)
    (a,), (b,) = (list(one.estimate_influence_values_group([group], [data.tests])) for one in (second, first))
    assert_near(a, b, 0.02)


def test_the_curvature_of_all_data_stays() -> None:
    data = plain()
    model = data.model()
    curvature = METHODS["ekfac"](model, [data.train], damping=DAMPING)
    before = {key: x.clone() for key, x in curvature.state_dict().items()}
    calculator = SecondOrderInfluenceCalculator(model, [data.train], curvature)
    list(calculator.estimate_influence_values_group([[rows(data.train, slice(9))]]))
    assert all(torch.equal(x, before[key]) for key, x in curvature.state_dict().items())


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("kind", ["neighbours", "random"])
def test_second_order_is_closer_to_fitting_again(kind: str, share: float) -> None:
    """Logistic regression. Neighbours: the examples with the lowest values of the first feature."""
    own = breast_cancer(l2=0.1)
    theta = own.fit()
    model = own.model(theta)
    curvature = ExactIHVP(model, own.train, damping=own.l2)
    order = own.x[:, 0].argsort() if kind == "neighbours" else torch.randperm(TRAIN, generator=generator(1))
    group = order[: int(share * TRAIN)]
    actual = (own.test_losses(own.fit(group, theta)) - own.test_losses(theta)).sum()
    first, second = (
        next(calculator(model, own.train, curvature).estimate_influence_values_group([own.group(group)], [own.test]))
        / TRAIN
        for calculator in (FirstOrderInfluenceCalculator, SecondOrderInfluenceCalculator)
    )
    assert abs(second - actual) < 0.75 * abs(first - actual)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_influence_predicts_leave_one_out_of_logistic_regression() -> None:
    """Every example of 200 left out, 60 queries: their losses, their logits, their mean loss."""
    own = breast_cancer(l2=0.03)
    theta = own.fit()
    model = own.model(theta)
    curvature = ExactIHVP(model, own.train, damping=own.l2)
    losses = FirstOrderInfluenceCalculator(model, own.train, curvature).scores(own.test) / TRAIN
    measured = FirstOrderInfluenceCalculator(
        model, own.train, curvature, measurement=lambda outputs, targets: outputs[:, 0]
    )
    without = torch.stack([own.fit(torch.tensor([i]), theta) for i in range(TRAIN)])
    moved = torch.stack([own.test_losses(one) for one in without], dim=1) - own.test_losses(theta)[:, None]
    assert correlation(losses, moved) > 0.98
    assert correlation(losses.mean(0), moved.mean(0)) > 0.98
    logits = torch.cat([own.test_x, torch.ones(len(own.test_x), 1, dtype=F64)], dim=1) @ (without - theta).T
    assert correlation(measured.scores(own.test) / TRAIN, logits) > 0.98


# --- bad input ---------------------------------------------------------------------------------------------------


def wrong(change: Callable[[Any, InfluenceModel, list[Any]], Any]) -> Callable[[], Any]:
    def call() -> Any:
        data = plain()
        return change(data, data.model(), batches(data.train, 8))

    return call


def values(model: InfluenceModel, train: list[Any], *groups: Any) -> list[Tensor]:
    calculator = SecondOrderInfluenceCalculator(model, train, IdentityIHVP(model))
    return list(calculator.estimate_influence_values_group(*groups))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unequal numbers": (
        wrong(lambda data, model, train: values(model, train, [train[:1], train[1:2]], [train[:1]])),
        ValueError,
        "train_groups and test_groups must be as many, got 2 and 1",
    ),
    "a group without batches": (
        wrong(lambda data, model, train: values(model, train, [[]])),
        ValueError,
        r"the loader yielded no batch \(group\)",
    ),
    "a group without examples": (
        wrong(lambda data, model, train: values(model, train, [[rows(train[0], slice(0))]])),
        ValueError,
        "a group must hold examples, got none",
    ),
    "a group as large as the data": (
        wrong(lambda data, model, train: values(model, train, [train])),
        ValueError,
        "a group must be smaller than the training data of 29 examples, got 29",
    ),
    "sign": (
        wrong(lambda data, model, train: SecondOrderInfluenceCalculator(model, train, IdentityIHVP(model), "plus")),
        ValueError,
        "sign must be one of proponent, loss_change, got 'plus'",
    ),
    "curvature": (
        wrong(lambda data, model, train: SecondOrderInfluenceCalculator(model, train, model)),
        TypeError,
        "curvature must be an IHVP object, got InfluenceModel",
    ),
    "curvature of another model": (
        wrong(lambda data, model, train: SecondOrderInfluenceCalculator(model, train, IdentityIHVP(data.model()))),
        ValueError,
        "curvature must be an IHVP object of this model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str) -> None:
    call, error, match = WRONG[case]
    with pytest.raises(error, match=match):
        call()


def test_weights_count_in_the_gradients() -> None:
    """An example of weight 0 in the group changes nothing but the group's size."""
    data = plain()
    weights = torch.ones(29, dtype=F64)
    weights[2] = 0
    train = replace(data.train, weights=weights)
    model = data.model()
    curvature = METHODS["hessian"](model, [train], damping=1.0)
    calculator = SecondOrderInfluenceCalculator(model, [train], curvature)
    (two,), (three,) = (
        list(calculator.estimate_influence_parts_group([[rows(train, slice(n))]], [data.tests])) for n in (2, 3)
    )
    assert_near(two.first_order / (1 - 4 / 29) * (1 - 2 / 29) ** 2, three.first_order / (1 - 6 / 29) * (26 / 29) ** 2)


@pytest.mark.parametrize("name", ["cgd", "nystroem", "arnoldi"])
def test_iterative_curvatures(name: str) -> None:
    """CG to its tolerance of 1e-4, sketches of full rank to 1e-4: against the direct solve."""
    data = plain()
    model = data.model()
    p = model.nb_params
    options = {"cgd": {"rtol": 1e-6}, "nystroem": {"rank": p}, "arnoldi": {"rank": p - 1, "krylov_dimension": p}}[name]
    common = {"damping": 0.5, "curvature": "gauss_newton"}
    if name == "arnoldi":
        common["complement"] = "damped"
    curvature = make_ihvp(name, model, [data.train], {**common, **options})
    exact = make_ihvp("exact", model, [data.train], {"damping": 0.5, "curvature": "gauss_newton"})
    group = batches(rows(data.train, slice(6)), 4)
    own, want = (
        next(
            SecondOrderInfluenceCalculator(model, [data.train], one).estimate_influence_parts_group(
                [group], [data.tests]
            )
        )
        for one in (curvature, exact)
    )
    assert_near(own.total, want.total, 1e-4)
    one, two = (FirstOrderInfluenceCalculator(model, [data.train], curve) for curve in (curvature, exact))
    assert_near(one.perturbation(data.tests), two.perturbation(data.tests), 1e-4)
    assert_near(one.scores_by_layer(data.tests)["0"], two.scores_by_layer(data.tests)["0"], 1e-4)
    explored = one.explore_damping(data.tests, None, [0.5, 2.0])
    assert_near(explored[2.0]["full"], two.explore_damping(data.tests, None, [2.0])[2.0]["full"], 1e-4)
