"""First-order scores against g_q^T (F + damping I)^-1 g_n written out."""

from __future__ import annotations

import pytest
import torch
from dense_problem import DAMPING, Dense
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, InfluenceModel, ops
from nets import (
    F64,
    METHODS,
    PROBLEMS,
    Problem,
    assert_near,
    batches,
    cross_entropy,
    dense_scores,
    flat,
    gradients,
    pooled,
    rows,
)
from torch import Tensor, nn

# --- against the definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_scores_and_self_scores(method: str, problem: str) -> None:
    dense = Dense(problem, method)
    assert_near(dense.calculator.scores(dense.data.tests), dense.scores)
    assert_near(dense.calculator.self_scores(), dense.self_scores)
    crossed = dense.calculator.scores(dense.train, dense.train)
    assert_near(crossed, crossed.T)
    assert_near(dense.calculator.self_scores(dense.train), crossed.diagonal())


@pytest.mark.parametrize("method", ["kfac none", "ekfac"])
def test_queries_of_few_positions_are_rotated_as_tokens(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8)).double()

    def data(N: int, T: int) -> Batch:
        x, targets = torch.randn(N, T, 9, dtype=F64), torch.randint(8, (N, T))
        return Batch(args=(x,), targets=targets, mask=torch.arange(T) < torch.randint(1, T + 1, (N, 1)))

    dense = Dense(Problem(net, cross_entropy, data(11, 3), (data(2, 2), data(3, 3))), method)
    monkeypatch.delattr(ops, "ekfac_solve")
    assert_near(dense.calculator.scores(dense.data.tests), dense.scores)


@pytest.mark.parametrize("normalize", [True, "theta", "loss"])
@pytest.mark.parametrize("method", METHODS)
def test_relatif_divides_by_the_training_examples_norm(method: str, normalize: bool | str) -> None:
    dense = Dense("tokens", method, normalize=normalize)
    norms = dense.norms[normalize]
    assert_near(dense.calculator.scores(dense.data.tests), dense.scores / norms)
    assert_near(dense.calculator.self_scores(), dense.self_scores / norms)


@pytest.mark.parametrize("method", METHODS)
def test_size_of_batches_does_not_matter(method: str) -> None:
    """Also where queries of several forms meet: tokens, eigenbasis, dense; many training examples or few."""
    dense = Dense(pooled(60), method)
    queries = rows(dense.data.train, slice(6))
    one = dense.calculator.scores([queries], [dense.data.train])
    for sizes in ((1, 60), (6, 1), (4, 13)):
        tests, trains = (batches(data, size) for data, size in zip((queries, dense.data.train), sizes, strict=True))
        assert_near(dense.calculator.scores(tests, trains), one)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_is_no_example(method: str) -> None:
    dense = Dense("tokens", method, normalize="theta")
    empty = rows(dense.data.train, slice(0))
    tests, trains = [empty, *dense.data.tests], [dense.train[0], empty, *dense.train[1:]]
    want = dense.scores / dense.norms["theta"]
    assert_near(dense.calculator.scores(tests, trains), want)
    assert_near(dense.calculator.self_scores(trains), dense.self_scores / dense.norms["theta"])
    found = list(dense.calculator.top_k(tests, trains, k=2))
    assert [len(values) for _, values, _ in found] == [0, 2, 3, 4]
    assert torch.equal(torch.cat([indices for _, _, indices in found]), want.topk(2).indices)


class Routed(nn.Module):
    """Uses one of two layers, as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        return (self.one if way == 1 else self.two)(self.stem(x).tanh())


def routed() -> tuple[InfluenceModel, list[Batch]]:
    torch.manual_seed(0)
    model = InfluenceModel(Routed().double(), cross_entropy, progress=False)
    sizes = ((1, 20), (2, 25), (1, 3))
    data = [Batch(args=(torch.randn(n, 4, dtype=F64), way), targets=torch.randint(3, (n,))) for way, n in sizes]
    return model, data


@pytest.mark.parametrize("method", [name for name in METHODS if "kfac" not in name])
def test_layers_used_in_some_batches_have_gradient_zero_in_the_others(method: str) -> None:
    model, data = routed()
    curvature = METHODS[method](model, data, damping=DAMPING)
    g = torch.cat([flat(gradients(model, batch)) for batch in data])
    eye = {
        name: torch.eye(model.nb_params, dtype=F64)[:, at].view(-1, *layer.shape)
        for (name, layer), at in zip(
            model.layers.items(), torch.arange(model.nb_params).split([15, 12, 12]), strict=True
        )
    }
    inverse = flat(curvature.solve(eye))
    calculator = FirstOrderInfluenceCalculator(model, data, curvature)
    assert_near(calculator.scores(data), g @ inverse @ g.T)
    assert_near(calculator.self_scores(), (g @ inverse @ g.T).diagonal())
    if method == "fisher":
        assert_near(flat(curvature.multiply(eye)), g.T @ g / len(g))


def test_layers_used_in_some_batches_kronecker() -> None:
    """A is a mean over the positions that the layer saw, G over all examples, Lambda over all examples."""
    model, data = routed()
    curvature = EKFACIHVP(model, data)
    for name, ways in (("stem", (0, 1, 2)), ("one", (0, 2)), ("two", (1,))):
        A, G = curvature.kfac_blocks[name]
        seen = [data[i].args[0] for i in ways]
        x = torch.cat(seen) if name == "stem" else model.net.stem(torch.cat(seen)).tanh().detach()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        assert_near(A, x.T @ x / len(x))
        bias_gradients = torch.cat([gradients(model, batch)[name][:, :, -1] for batch in data])
        assert_near(G, bias_gradients.T @ bias_gradients / 48)
        U_A, U_G = curvature.evecs[name]
        g = torch.cat([gradients(model, batch)[name] for batch in data])
        assert_near(curvature.evals[name], (U_G.T @ g @ U_A).square().mean(0))


# --- groups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, "theta", "loss"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_group_scores_are_sums_over_pairs(problem: str, normalize: bool | str) -> None:
    dense = Dense(problem, "ekfac", normalize=normalize)
    trains = [dense.train[:1], dense.train[1:3]]
    tests = [dense.data.tests[:1], dense.data.tests[1:]]
    values = list(dense.calculator.estimate_influence_values_group(trains, tests))
    g_train = dense.g_train.split([8, 16, 5])[:2]
    g_test = [dense.g_tests[0], torch.cat(dense.g_tests[1:])]
    for value, own, query in zip(values, g_train, g_test, strict=True):
        assert value.shape == (1, 1)
        total = own.sum(0, keepdim=True)
        P = torch.linalg.solve(dense.damped, total.T).T
        norm = {False: torch.ones(()), "theta": P.norm(), "loss": (P * total).sum().sqrt()}[normalize]
        assert_near(value, dense_scores(dense.damped, query, own).sum().view(1, 1) / norm)


def test_groups_of_their_own() -> None:
    dense = Dense("tokens", "kfac pi")
    (value,) = dense.calculator.estimate_influence_values_group([dense.train])
    assert_near(value, dense_scores(dense.damped, dense.g_train, dense.g_train).sum().view(1, 1))
