"""Influence on measurements, by layer and block, over dampings, and perturbation: against the dense formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import ihvp
import pytest
import torch
import torch.nn.functional as F
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel
from nets import (
    F64,
    METHODS,
    PROBLEMS,
    assert_near,
    batches,
    cross_entropy,
    dense_scores,
    flat,
    gradients,
    plain,
    rows,
    tokens,
)
from torch import Tensor, nn

DAMPING = 0.3


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """The target's logit over the mean of all: (N,) or (N,T)."""
    return outputs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - outputs.mean(-1)


def problem(name: str, method: str, **options: Any) -> tuple[Any, InfluenceModel, FirstOrderInfluenceCalculator]:
    data = PROBLEMS[name]()
    model = data.model()
    train = batches(data.train, 8)
    curvature = METHODS[method](model, train, damping=DAMPING)
    return data, model, FirstOrderInfluenceCalculator(model, train, curvature, **options)


# --- measurements ------------------------------------------------------------------------------------------------


EVERY = [(method, "plain") for method in METHODS] + [
    (method, name) for name in ("tokens", "pooled") for method in ("ekfac", "kfac pi", "fisher", "hessian")
]


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_scores_of_a_measurement(method: str, name: str) -> None:
    data, model, calculator = problem(name, method, measurement=margin)
    measured = InfluenceModel(data.net, margin, progress=False)
    queries = torch.cat([flat(gradients(measured, batch)) for batch in data.tests])
    train = flat(gradients(model, data.train))
    want = dense_scores(METHODS[method].damped(model, data.train, DAMPING), queries, train)
    assert_near(calculator.scores(data.tests), want)
    found = list(calculator.top_k(data.tests, k=3))
    assert_near(torch.cat([values for _, values, _ in found]), want.topk(3).values)
    groups = calculator.estimate_influence_values_group([calculator.train_loader], [data.tests])
    assert_near(next(iter(groups)), want.sum().view(1, 1))


def test_a_measurement_leaves_the_self_influence() -> None:
    _, _, measured = problem("tokens", "ekfac", measurement=margin)
    _, _, plain_one = problem("tokens", "ekfac")
    assert torch.equal(measured.self_scores(), plain_one.self_scores())


@pytest.mark.parametrize(
    ("measurement", "error", "match"),
    [
        (3, TypeError, "measurement must be callable, got int"),
        (lambda outputs, targets: outputs.sum(), ValueError, r"measurement must return one value per example"),
        (lambda outputs, targets: 1.0, TypeError, "measurement must return a tensor, got float"),
    ],
)
def test_wrong_measurements(measurement: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        data, _, calculator = problem("plain", "identity", measurement=measurement)
        calculator.scores(data.tests)


# --- by layer and by block ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), EVERY)
@pytest.mark.parametrize("normalize", [False, "theta"])
def test_scores_by_layer_are_those_of_the_layers_gradients(method: str, name: str, normalize: bool | str) -> None:
    data, model, calculator = problem(name, method, normalize=normalize)
    damped = METHODS[method].damped(model, data.train, DAMPING)
    g_train = flat(gradients(model, data.train))
    P = torch.linalg.solve(damped, torch.cat([flat(gradients(model, batch)) for batch in data.tests]).T).T
    norms = torch.linalg.solve(damped, g_train.T).norm(dim=0) if normalize else torch.ones(len(g_train), dtype=F64)
    found = calculator.scores_by_layer(data.tests)
    assert list(found) == list(model.layers)
    sizes = [O * I for O, I in (layer.shape for layer in model.layers.values())]
    for own, p, g in zip(found.values(), P.split(sizes, dim=1), g_train.split(sizes, dim=1), strict=True):
        assert_near(own, p @ g.T / norms)
    assert_near(sum(found.values()), calculator.scores(data.tests))


@pytest.mark.parametrize("method", METHODS)
def test_scores_by_block_sum_to_the_scores(method: str) -> None:
    data, model, calculator = problem("plain", method, sign="loss_change")
    found = calculator.scores_by_block(data.tests)
    assert found.keys() == calculator.curvature.blocks.keys()
    assert_near(sum(found.values()), calculator.scores(data.tests))
    if set(found) == set(model.layers):
        by_layer = calculator.scores_by_layer(data.tests)
        assert all(torch.equal(found[name], by_layer[name]) for name in found)


def test_blocks_of_single_parameters() -> None:
    """A curvature whose blocks are columns of a layer: weight and bias apart."""

    class ByParameter(IdentityIHVP):
        block_structure: ClassVar = {"weights": ["0.weight", "2.weight"], "biases": ["0.bias", "2.bias"]}

    data = tokens()
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, [data.train], ByParameter(model))
    found = calculator.scores_by_block(data.tests)
    assert list(found) == ["weights", "biases"]
    g_train = gradients(model, data.train)
    g_test = [gradients(model, batch) for batch in data.tests]
    for block, own in calculator.curvature.blocks.items():
        want = torch.zeros(9, 29, dtype=F64)
        for name, columns in own.items():
            test = torch.cat([g[name] for g in g_test])[..., columns].flatten(1)
            want += test @ g_train[name][..., columns].flatten(1).T
        assert_near(found[block], want)


@pytest.mark.parametrize("method", ["ekfac", "kfac none", "fisher", "hessian", "diagonal"])
def test_explored_dampings_are_those_of_separate_objects(method: str) -> None:
    """Queries are other data than the training data."""
    data, model, calculator = problem("pooled", method, measurement=margin)
    dampings = (0.05, "auto", 2)
    found = calculator.explore_damping(data.tests, None, dampings)
    assert list(found) == list(dampings)
    for damping, by_block in found.items():
        curvature = METHODS[method](model, calculator.train_loader, damping=damping)
        one = FirstOrderInfluenceCalculator(model, calculator.train_loader, curvature, measurement=margin)
        want = one.scores_by_block(data.tests)
        assert by_block.keys() == want.keys()
        for block, scores in by_block.items():
            assert_near(scores, want[block])


def test_wrong_explorations() -> None:
    data, _, calculator = problem("plain", "ekfac", normalize="theta")
    with pytest.raises(ValueError, match="explore_damping needs normalize=False, got 'theta'"):
        calculator.explore_damping(data.tests, None, [1.0])
    with pytest.raises(ValueError, match="perturbation needs normalize=False, got 'theta'"):
        calculator.perturbation(data.tests)
    data, _, calculator = problem("plain", "ekfac")
    with pytest.raises(ValueError, match=r"dampings must list numbers or \"auto\", at least one, got \[\]"):
        calculator.explore_damping(data.tests, None, [])


# --- perturbation ------------------------------------------------------------------------------------------------


def shifted(batch: Batch, step: Tensor) -> Batch:
    """The batch with its input moved by step, (N,*x)."""
    if batch.args:
        return replace(batch, args=(batch.args[0] + step,))
    return replace(batch, kwargs={**batch.kwargs, "x": batch.kwargs["x"] + step})


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["ekfac", "kfac pi", "fisher", "hessian", "identity"])
def test_perturbation_against_finite_differences(method: str, name: str) -> None:
    """Central differences of the scores, the curvature held fixed; their error is of the order of the step squared."""
    data, _, calculator = problem(name, method)
    found = calculator.perturbation(data.tests)
    x = data.train.args[0] if data.train.args else data.train.kwargs["x"]
    Q = sum(batch.size for batch in data.tests)
    assert found.shape == (Q, *x.shape)
    torch.manual_seed(0)
    for _ in range(3):
        direction, step = torch.randn_like(x), 1e-5
        ahead, behind = (
            calculator.scores(data.tests, [shifted(data.train, sign * step * direction)]) for sign in (1, -1)
        )
        assert_near((found * direction).flatten(2).sum(2), (ahead - behind) / (2 * step), 1e-7)


def test_perturbation_of_ridge_regression_in_closed_form() -> None:
    """L = (w x - y)^2 / 2: the score P (w x - y) x^T has the derivative P_x w (r) + ..., written out for one output."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False).double()
    model = InfluenceModel(net, lambda outputs, targets: (outputs - targets).square().sum(-1) / 2, progress=False)
    x, y, x_q, y_q = (torch.randn(*shape, dtype=F64) for shape in ((11, 3), (11, 1), (2, 3), (2, 1)))
    curvature = ihvp.ExactIHVP(model, [(x, y)], damping=0.1)
    calculator = FirstOrderInfluenceCalculator(model, [(x, y)], curvature, sign="loss_change")
    w = net.weight.detach()
    P = torch.linalg.solve(x.T @ x / 11 + 0.1 * torch.eye(3, dtype=F64), ((x_q @ w.T - y_q) * x_q).T).T
    residual = x @ w.T - y
    want = P[:, None] * residual + (P @ x.T)[:, :, None] * w
    assert_near(calculator.perturbation([(x_q, y_q)]), -want)


def test_perturbation_of_one_batch_or_many() -> None:
    data, _, calculator = problem("tokens", "ekfac")
    whole = calculator.perturbation(data.tests, [data.train])
    assert_near(calculator.perturbation([data.tests[0], *data.tests[1:]], batches(data.train, 5)), whole)
    with torch.no_grad():
        assert_near(calculator.perturbation(data.tests, [data.train]), whole)
    for p in data.net.parameters():
        assert p.requires_grad and p.grad is None


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(1))


def test_perturbation_needs_real_inputs() -> None:
    torch.manual_seed(0)
    model = InfluenceModel(Embedded(), cross_entropy, layers=["head"], progress=False)
    train = [(torch.randint(7, (5, 6)), torch.randint(3, (5,)))]
    calculator = FirstOrderInfluenceCalculator(model, train, IdentityIHVP(model))
    with pytest.raises(
        TypeError, match=r"batch 0: args\[0\] must be a floating-point tensor.* got a tensor of .*int64"
    ):
        calculator.perturbation(train)


def test_perturbation_needs_inputs_of_one_shape() -> None:
    data = tokens()
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, data.tests, IdentityIHVP(model))
    with pytest.raises(
        ValueError, match=r"training inputs must be of one shape, got \(5, 4\) in batch 0, \(1, 4\) in 1"
    ):
        calculator.perturbation(data.tests)


def test_perturbation_of_a_convolutional_net() -> None:
    """Inputs of several dimensions; layers that are not tracked lie before and after."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    model = InfluenceModel(net, cross_entropy, layers=["3"], progress=False)
    x, y = torch.randn(5, 1, 4, 4, dtype=F64), torch.randint(3, (5,))
    calculator = FirstOrderInfluenceCalculator(model, [(x, y)], EKFACIHVP(model, [(x, y)]))
    found = calculator.perturbation([(x[:2], y[:2])])
    assert found.shape == (2, 5, 1, 4, 4)
    direction, step = torch.randn_like(x), 1e-5
    ahead, behind = (calculator.scores([(x[:2], y[:2])], [(x + s * direction, y)]) for s in (step, -step))
    assert_near((found * direction).flatten(2).sum(2), (ahead - behind) / (2 * step), 1e-7)


def test_padded_positions_do_not_matter() -> None:
    data, _, calculator = problem("tokens", "kfac pi")
    found = calculator.perturbation(data.tests, [data.train])
    assert (found[:, ~data.train.mask] == 0).all() and (found[:, data.train.mask] != 0).any()


def test_a_few_queries_at_a_time() -> None:
    """More queries than are differentiated at once."""
    data = plain(5)
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, [data.train], IdentityIHVP(model))
    many = rows(data.train, torch.arange(40) % 5)
    found = calculator.perturbation([many])
    assert_near(found[:5], found[35:])
    assert F.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) < 0.999
