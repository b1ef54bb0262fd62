"""Many small layers, scored and solved together: the numbers are those of the definition, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ihvp
import pytest
import torch
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, IdentityIHVP, ops
from ihvp.capture import capture
from ihvp.methods import queries, scoring
from nets import (
    F64,
    METHODS,
    Problem,
    assert_near,
    batches,
    cross_entropy,
    dense_scores,
    flat,
    gradients,
    random_vectors,
)
from torch import Tensor, nn

DAMPING = 0.3
BLOCKS = 5


class Adapter(nn.Module):
    """A frozen layer and its low-rank addition, of which every other one has a bias."""

    def __init__(self, width: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.A, self.B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return (self.base(x) + self.B(self.A(x))).tanh()


class Adapted(nn.Module):
    """Adapters on tokens, a small layer used twice, and two on the masked mean, of one position an example."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Adapter(4, 1 + i % 2, i % 2 == 0) for i in range(BLOCKS)))
        self.mix = nn.Linear(4, 4)
        self.top = nn.Sequential(Adapter(4, 2, True), nn.Linear(4, 3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.blocks(x)
        h = torch.where(mask.unsqueeze(-1), h + self.mix(self.mix(h).tanh()), 0)
        return self.top(h.sum(1) / mask.sum(1, keepdim=True))


TRACKED = ["*.A", "*.B", "mix", "top.1"]


def adapted(T: int) -> Problem:
    torch.manual_seed(4)
    net = Adapted().double()

    def data(N: int, T: int) -> Batch:
        mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1))
        inputs = {"x": torch.randn(N, T, 4, dtype=F64), "mask": mask}
        return Batch(kwargs=inputs, targets=torch.randint(3, (N,)), mask=mask)

    return Problem(net, cross_entropy, data(19, T), (data(2, T + 1), data(3, T)))


class Calls:
    """How many layers each call of an op had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
        self.layers: list[int] = []
        own: Callable[..., Any] = getattr(ops, op)

        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            self.layers.append(len(first))
            return own(first, *rest, **options)

        monkeypatch.setattr(ops, op, counted)


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("method", ["identity", "diagonal", "fisher", "kfac pi", "kfac none", "ekfac"])
def test_scores_are_those_of_the_definition(method: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = adapted(T)
    model = problem.model(layers=TRACKED)
    assert len(queries.small_layers(model)) == len(model.layers) == 2 * BLOCKS + 4
    calls = Calls(monkeypatch, "gradient_dot_grouped")
    train = batches(problem.train, 8)
    curvature = METHODS[method](model, train, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature)
    g_train, g_test = (
        torch.cat([flat(gradients(model, batch)) for batch in data]) for data in ([problem.train], problem.tests)
    )
    want = dense_scores(METHODS[method].damped(model, problem.train, DAMPING), g_test, g_train)
    assert_near(calculator.scores(problem.tests), want)
    # In groups: those without a bias, those with one. The layer used twice has no company.
    assert sum(calls.layers) >= len(train) * (2 * BLOCKS + 1) and min(calls.layers) > 1


def test_parts_sum_to_the_whole() -> None:
    problem = adapted(4)
    model = problem.model(layers=TRACKED)
    calculator = FirstOrderInfluenceCalculator(model, [problem.train], EKFACIHVP(model, [problem.train]))
    want = calculator.scores(problem.tests)
    by_layer = calculator.scores_by_layer(problem.tests)
    assert list(by_layer) == list(model.layers)
    assert_near(torch.stack(list(by_layer.values())).sum(0), want)
    explored = calculator.explore_damping(problem.tests, [problem.train], [1e-3, 0.5])
    assert_near(torch.stack(list(explored[1e-3].values())).sum(0), want)


@pytest.mark.parametrize("limit", [0, 2000])
def test_what_waits_is_bounded(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = adapted(4)
    model = problem.model(layers=TRACKED)
    calculator = FirstOrderInfluenceCalculator(model, [problem.train], EKFACIHVP(model, [problem.train]))
    want = calculator.scores(problem.tests)
    calls = Calls(monkeypatch, "gradient_dot_grouped")
    monkeypatch.setattr(scoring, "WAITING", limit)
    assert_near(calculator.scores(problem.tests), want)
    assert max(calls.layers, default=0) < 4  # of 19 examples, 4 positions, 5 or 6 features: some 3,500 bytes a layer


def test_few_small_layers_are_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = adapted(4)
    calls = Calls(monkeypatch, "gradient_dot_grouped")
    model = problem.model(layers=["blocks.0.*", "blocks.1.*"])
    assert queries.small_layers(model) == frozenset()
    FirstOrderInfluenceCalculator(model, [problem.train], IdentityIHVP(model)).scores(problem.tests)
    assert calls.layers == []
    wide = ihvp.InfluenceModel(nn.Sequential(*(nn.Linear(129, 2) for _ in range(9))), cross_entropy)
    assert queries.small_layers(wide) == frozenset()  # with the bias, 130 columns


def test_ekfac_solves_small_layers_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = adapted(4)
    model = problem.model(layers=TRACKED)
    curvature = EKFACIHVP(model, [problem.train], damping="auto")
    V = random_vectors(model)
    want = {name: curvature._solve_layer(name, v, "auto") for name, v in V.items()}
    calls = Calls(monkeypatch, "ekfac_solve_grouped")
    got = curvature.solve(V)
    assert calls.layers == [len(model.layers)] and list(got) == list(V)
    for name in V:
        assert_near(got[name], want[name])
    narrow = curvature.solve({name: v.float() if name == "mix" else v for name, v in V.items()})
    assert_near(narrow["mix"], want["mix"], 1e-6)


def test_a_score_that_is_not_finite_names_its_layer() -> None:
    problem = adapted(4)
    model = problem.model(layers=TRACKED)
    batch = problem.train
    own = IdentityIHVP(model).queries(problem.tests[1])
    own["blocks.2.B"].dense()[1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"layer 'blocks.2.B', batch 7: score is not finite"):
        scores = scoring.BatchScores(model, {"": own}, batch, 7)
        capture(model, batch, scores, index=7)
        scores.totals()
