"""Scores through trainings that followed each other: against the dense formula, and against training again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ihvp import (
    EKFACIHVP,
    Batch,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    MultiStageInfluenceCalculator,
)
from nets import F64, METHODS, PROBLEMS, assert_near, batches, flat, gradients, rows, squared_error
from torch import Tensor, nn

DAMPINGS = (0.2, 0.5, 0.3)  # of the first training, and the alphas


class Stages:
    """A problem's net at three points of its training, each with a curvature of its own data, and the dense truth."""

    def __init__(self, name: str, methods: tuple[str, ...], **options: Any) -> None:
        data = self.data = PROBLEMS[name]()
        self.models, curvatures, self.damped = [], [], []
        torch.manual_seed(9)
        for i, method in enumerate(methods):
            net = copy.deepcopy(data.net)
            with torch.no_grad():
                for p in net.parameters():
                    p += 0.1 * i * torch.randn_like(p)
            model = InfluenceModel(net, data.loss_fn, progress=False)
            own = rows(data.train, slice(0, 29 - 5 * i))
            curvatures.append(METHODS[method](model, batches(own, 8), damping=DAMPINGS[i]))
            self.damped.append(METHODS[method].damped(model, own, DAMPINGS[i]))
            self.models.append(model)
        self.g = flat(gradients(self.models[0], data.train))
        self.g_query = torch.cat([flat(gradients(self.models[-1], batch)) for batch in data.tests])
        self.moved = self.g.T  # through all stages
        for damped in self.damped:
            self.moved = torch.linalg.solve(damped, self.moved)
        self.scores = self.g_query @ self.moved
        self.calculator = MultiStageInfluenceCalculator(curvatures, batches(data.train, 8), **options)


def transposed(stages: Stages) -> Tensor:
    """g_q^T (F_S + alpha I)^-1 ... (F_1 + damping I)^-1 g_n, solved from the query's side."""
    x = stages.g_query.T
    for damped in reversed(stages.damped):
        x = torch.linalg.solve(damped.T, x)
    return x.T @ stages.g.T


CASES = [("ekfac", "ekfac"), ("kfac pi", "ekfac", "fisher"), ("hessian", "gauss_newton"), ("identity", "ekfac")]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("methods", CASES, ids="-".join)
def test_scores_and_all_that_is_made_of_them(methods: tuple[str, ...], name: str) -> None:
    stages = Stages(name, methods)
    calculator, tests = stages.calculator, stages.data.tests
    assert_near(stages.scores, transposed(stages))
    assert_near(calculator.scores(tests), stages.scores)
    found = list(calculator.top_k(tests, k=3))
    assert_near(torch.cat([values for _, values, _ in found]), stages.scores.topk(3).values)
    assert_near(torch.stack(list(calculator.scores_by_layer(tests).values())).sum(0), stages.scores)
    groups = calculator.estimate_influence_values_group([calculator.train_loader], [tests])
    assert_near(next(groups), stages.scores.sum().view(1, 1))
    explored = calculator.explore_damping(tests, None, [DAMPINGS[0]])[DAMPINGS[0]]
    assert_near(torch.stack(list(explored.values())).sum(0), stages.scores)


@pytest.mark.parametrize("normalize", [False, True, "theta"])
def test_self_influence_and_norms(normalize: bool | str) -> None:
    stages = Stages("tokens", ("ekfac", "kfac none", "ekfac"), normalize=normalize)
    own = flat(gradients(stages.models[-1], stages.data.train))
    norms = stages.moved.norm(dim=0) if normalize else torch.ones(29, dtype=F64)
    assert_near(stages.calculator.self_scores(), (own * stages.moved.T).sum(1) / norms)
    assert_near(stages.calculator.scores(stages.data.tests), stages.scores / norms)
    one = rows(stages.data.train, slice(3, 4))
    value = next(stages.calculator.estimate_influence_values_group([[one]]))
    assert_near(value, ((own * stages.moved.T).sum(1) / norms)[3].view(1, 1))


def test_measurements_signs_ranks_and_tokens() -> None:
    def first_logit(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[..., 0]

    stages = Stages("tokens", ("ekfac", "ekfac"), measurement=first_logit, sign="loss_change", query_rank=50)
    measured = InfluenceModel(stages.models[-1].net, first_logit, progress=False)
    g = torch.cat([flat(gradients(measured, batch)) for batch in stages.data.tests])
    want = -(g @ stages.moved)
    assert_near(stages.calculator.scores(stages.data.tests), want)
    for of in ("position", "loss"):
        apart = torch.cat([x for _, x in stages.calculator.scores_by_token(stages.data.tests, of=of)], dim=1)
        assert_near(apart.sum(2), want)


def test_identical_stages_of_an_identity_change_nothing() -> None:
    """A later stage that is the identity, at the same weights, leaves first-order influence."""
    data = PROBLEMS["tokens"]()
    model, train = data.model(), batches(data.train, 8)
    curvature = EKFACIHVP(model, train, damping=0.2)
    one = FirstOrderInfluenceCalculator(model, train, curvature)
    two = MultiStageInfluenceCalculator([curvature, IdentityIHVP(data.model())], train)
    assert_near(two.scores(data.tests), one.scores(data.tests))
    assert_near(two.self_scores(), one.self_scores())


def test_queries_are_read_by_the_last_stages_model() -> None:
    """Each model has a process_batch of its own."""
    stages = Stages("plain", ("ekfac", "ekfac"))
    last = stages.calculator.later_stages[0]
    last.model.process_batch = lambda pair: pair[0]
    packed = [(batch, "query") for batch in stages.data.tests]
    assert_near(stages.calculator.scores(packed), stages.scores)
    assert [len(values) for _, values, _ in stages.calculator.top_k(packed, k=2)] == [2, 1, 4]


# --- training again ----------------------------------------------------------------------------------------------


def test_ridge_regressions_trained_again() -> None:
    """Pretraining with l2, fine-tuning held near it by alpha: the score is the derivative of the query's loss by the
    weight of a pretraining example, over minus alpha."""
    torch.manual_seed(0)
    strength, alpha, N = 0.05, 0.7, 30

    def data(N: int, w: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, 4, dtype=F64)
        return x, x @ w.T + 0.3 * torch.randn(N, 2, dtype=F64)

    truth = torch.randn(2, 4, dtype=F64)
    (x, y), (x_ft, y_ft), (x_q, y_q) = data(N, truth), data(12, truth + 0.4), data(5, truth)
    eye = torch.eye(4, dtype=F64)

    def trained(weights: Tensor) -> tuple[Tensor, Tensor]:
        """Both minima, when example n counts weights[n] / N."""
        first = torch.linalg.solve((weights * x.T) @ x / N + strength * eye, (weights * x.T) @ y / N)
        second = torch.linalg.solve(x_ft.T @ x_ft / 12 + alpha * eye, x_ft.T @ y_ft / 12 + alpha * first)
        return first.T, second.T

    def model(weight: Tensor) -> InfluenceModel:
        net = nn.Linear(4, 2, bias=False).double()
        net.weight.data = weight.clone()
        return InfluenceModel(net, squared_error, progress=False)

    first, second = map(model, trained(torch.ones(N, dtype=F64)))
    stages = [
        ExactIHVP(first, [(x, y)], damping=strength),
        ExactIHVP(second, [(x_ft, y_ft)], damping=alpha),
    ]
    scores = MultiStageInfluenceCalculator(stages, [(x, y)]).scores([(x_q, y_q)])

    def query_losses(weights: Tensor) -> Tensor:
        return squared_error(x_q @ trained(weights)[1].T, y_q)

    derivative = torch.func.jacrev(query_losses)(torch.ones(N, dtype=F64)) * N
    assert_near(-alpha * scores, derivative)


# --- errors ------------------------------------------------------------------------------------------------------


def fitted(net: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> EKFACIHVP:
    model = InfluenceModel(net, loss_fn, progress=False)
    x = torch.randn(6, 4, dtype=F64)
    return EKFACIHVP(model, [Batch(args=(x,), targets=torch.randn(6, 2, dtype=F64))])


def test_wrong_stages_are_named() -> None:
    own = fitted(nn.Linear(4, 2).double(), squared_error)
    other = fitted(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(), squared_error)
    for stages in (own, [own], []):
        with pytest.raises(ValueError, match="stages must list two or more IHVP objects, got"):
            MultiStageInfluenceCalculator(stages)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"stages\[1\] must be an IHVP object, got InfluenceModel"):
        MultiStageInfluenceCalculator([own, own.model])  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match=r"stages\[1\] \(EKFACIHVP\) is not fitted"):
        MultiStageInfluenceCalculator([own, EKFACIHVP(own.model)])
    with pytest.raises(ValueError, match=r"stages\[1\] must have the layers \(O,I'\) \{'': \(2, 5\)\}, got"):
        MultiStageInfluenceCalculator([own, other])
    with pytest.raises(ValueError, match='normalize must be False, True or "theta"'):
        MultiStageInfluenceCalculator([own, own], normalize="loss")
