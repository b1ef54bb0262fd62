"""EmpiricalIF against a loop that moves a copy of the net, and its reverse check."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from ihvp import Batch, EmpiricalInfluence
from nets import F64, PROBLEMS, Problem, assert_near, batches, gradients, losses, plain, rows
from torch import Tensor

STEP = 0.1


def changes(data: Problem, source: Batch, batch: Batch, step: float = STEP) -> Tensor:
    """(2,N): what the batch's losses change by when a copy of the net climbs, or descends, the source's loss."""
    model = data.model()
    before = losses(model, batch, data.net(*batch.args, **batch.kwargs))
    g = gradients(model, source)
    found = []
    for length in (step, -step):
        net = copy.deepcopy(data.net)
        own = dict(net.named_parameters())
        for name, layer in model.layers.items():
            for key, part in layer.split(g[name][0]).items():
                own[key].data += length * part
        found.append(losses(model, batch, net(*batch.args, **batch.kwargs)) - before)
    return torch.stack(found).detach()


def one(batch: Batch, n: int) -> Batch:
    return rows(batch, slice(n, n + 1))


def naive(data: Problem, test: Batch, train: Batch) -> Tensor:
    scores = torch.zeros(test.size, train.size, dtype=F64)
    for q in range(test.size):
        query = one(test, q)
        own = changes(data, query, query)[:, 0]
        scores[q] = 0.5 * (own[0] * changes(data, query, train)[0] + own[1] * changes(data, query, train)[1])
    return scores


@pytest.mark.parametrize("name", PROBLEMS)
def test_scores(name: str) -> None:
    data = PROBLEMS[name](13)
    calculator = EmpiricalInfluence(data.model(), batches(data.train, 5), step=STEP)
    want = torch.cat([naive(data, batch, data.train) for batch in data.tests])
    assert_near(calculator.scores(data.tests), want)
    assert_near(calculator.self_scores(), naive(data, data.train, data.train).diagonal())
    assert_near(torch.cat([values for _, values, _ in calculator.top_k(data.tests, k=3)]), want.topk(3).values)
    other = EmpiricalInfluence(data.model(), batches(data.train, 5), step=STEP, sign="loss_change")
    assert_near(other.scores(data.tests), -want)


def test_small_steps_give_dot_products_of_gradients() -> None:
    """step^2 ||g_q||^2 g_q^T g_n, up to terms of the fourth order; rounding divides by the square of the step."""
    data, step = plain(), 1e-4
    calculator = EmpiricalInfluence(data.model(), [data.train], step=step)
    model = data.model()
    g_test, g_train = (
        torch.cat([v.flatten(1) for v in gradients(model, batch).values()], dim=1)
        for batch in (data.tests[0], data.train)
    )
    want = step**2 * g_test.square().sum(1, keepdim=True) * (g_test @ g_train.T)
    assert_near(calculator.scores(data.tests[:1]), want, 1e-6)


def test_reverse_check() -> None:
    data = plain()
    calculator = EmpiricalInfluence(data.model(), batches(data.train, 8), step=STEP)
    query = one(data.tests[0], 0)
    values = calculator.scores([query])[0]
    highest, lowest = calculator.reverse_check(*query.args, query.targets, values, check_ratio=0.1)
    order = values.argsort(descending=True).tolist()
    assert [i for i, _, _ in highest] == order[:2] and [i for i, _, _ in lowest] == order[:-3:-1]
    for i, value, reverse in highest + lowest:
        assert value == float(values[i])
        train = one(data.train, i)
        want = 0.5 * (changes(data, train, train)[:, 0] * changes(data, train, query)[:, 0]).sum()
        assert_near(torch.tensor(reverse, dtype=F64), want)
    (most,), (least,) = calculator.reverse_check(*query.args, query.targets, values.tolist())
    assert most == highest[0] and least == lowest[0]
    assert most[2] > 0 > least[2]  # who influences is influenced


def test_the_net_is_left_as_it_was() -> None:
    data = plain()
    before = {key: x.clone() for key, x in data.net.state_dict().items()}
    EmpiricalInfluence(data.model(), [data.train]).scores(data.tests)
    assert all(torch.equal(x, before[key]) for key, x in data.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in data.net.parameters())


def test_only_tracked_layers_move() -> None:
    data = plain()
    last = EmpiricalInfluence(data.model(start_layer=-1), [data.train], step=STEP).scores(data.tests)
    frozen = replace(data, train=data.train)
    model = frozen.model(start_layer=-1)
    g = gradients(model, one(data.tests[0], 0))
    assert list(g) == ["2"]
    assert float((last - EmpiricalInfluence(data.model(), [data.train], step=STEP).scores(data.tests)).norm()) > 0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"influence_values": torch.zeros(28)}, r"influence_values must be \(N,\) with N=29 training examples, got 28"),
    ({"influence_values": torch.zeros(1, 29)}, r"influence_values must be \(N,\), got \(1, 29\)"),
    ({"check_ratio": 0.0}, r"check_ratio must be in \(0, 1\], got 0.0"),
    ({"query_input": torch.zeros(2, 4, dtype=F64), "query_target": torch.zeros(2)}, "must be a batch of 1, got 2"),
]


@pytest.mark.parametrize(("change", "match"), WRONG)
def test_wrong_reverse_checks(change: dict[str, Any], match: str) -> None:
    data = plain()
    calculator = EmpiricalInfluence(data.model(), [data.train])
    query = one(data.tests[0], 0)
    right = {"query_input": query.args[0], "query_target": query.targets, "influence_values": torch.zeros(29)}
    with pytest.raises(ValueError, match=match):
        calculator.reverse_check(**{**right, **change})


@pytest.mark.parametrize("step", [0, -1.0, float("inf"), "far", True])
def test_wrong_steps(step: Any) -> None:
    with pytest.raises(ValueError, match="step must be a positive number"):
        EmpiricalInfluence(plain().model(), step=step)
