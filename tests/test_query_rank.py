"""Queries kept as factors of low rank, against the singular vectors of the whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel
from ihvp.methods.queries import DenseQueries, LowRankQueries, TokenQueries, truncated
from nets import F64, METHODS, Problem, assert_near, batches, chain, cross_entropy, flat, gradients, rows
from torch import Tensor, nn

DAMPING, RANK = 0.3, 4


def wide(T: int | None = 3) -> Problem:
    """Layers of 12 x 15 and 14 x 12, whose subspaces of rank + 8 directions are whole, and one too small to gain."""
    torch.manual_seed(6)
    net = chain(14, 12, 14, 3).double()

    def data(N: int, T: int | None) -> Batch:
        shape = (N,) if T is None else (N, T)
        x, targets = torch.randn(*shape, 14, dtype=F64), torch.randint(3, shape)
        mask = None if T is None else torch.arange(T) < torch.randint(1, T + 1, (N, 1))
        return Batch(args=(x,), targets=targets, mask=mask)

    return Problem(net, cross_entropy, data(9, T), (data(2, T and 5), data(3, T and 2)))


def made(data: Problem, method: str, **options: Any) -> FirstOrderInfluenceCalculator:
    model, train = data.model(), batches(data.train, 4)
    return FirstOrderInfluenceCalculator(model, train, METHODS[method](model, train, damping=DAMPING), **options)


def best(P: Tensor, rank: int) -> Tensor:
    O, I = P.shape[1:]
    if rank * (O + I) >= O * I:
        return P
    U, values, V = torch.linalg.svd(P.double(), full_matrices=False)
    return (U[..., :rank] * values[:, None, :rank]) @ V[:, :rank]


CURVATURES = ["identity", "diagonal", "kfac pi", "kfac none", "ekfac", "fisher"]


@pytest.mark.parametrize("T", [3, None])
@pytest.mark.parametrize("method", CURVATURES)
def test_scores_of_rank(method: str, T: int | None) -> None:
    """Every form of queries: dense, tokens of more and of fewer positions than the rank, tokens in the eigenbasis."""
    data = wide(T)
    calculator = made(data, method, query_rank=RANK)
    model = calculator.model
    solved = [calculator.curvature.solve(gradients(model, batch)) for batch in data.tests]
    P = {name: best(torch.cat([own[name] for own in solved]), RANK) for name in model.layers}
    want = flat(P) @ flat(gradients(model, data.train)).T
    assert_near(calculator.scores(data.tests), want)
    assert_near(torch.cat([values for _, values, _ in calculator.top_k(data.tests, k=9)]), want.sort(1, True).values)
    by_layer = calculator.scores_by_layer(data.tests)
    assert_near(torch.stack(list(by_layer.values())).sum(0), want)
    if T is not None:
        for of in ("position", "loss"):
            apart = torch.cat([scores for _, scores in calculator.scores_by_token(data.tests, of=of)], dim=1)
            assert_near(apart.sum(2), want)
    [(_, explored)] = calculator.explore_damping(data.tests, None, [DAMPING]).items()
    assert_near(torch.stack(list(explored.values())).sum(0), want)


def test_the_forms() -> None:
    data = wide()
    queries = [made(data, "ekfac", query_rank=RANK)._ready(batch, 0) for batch in data.tests]
    for own in queries:
        assert [type(one) for one in own.values()] == [LowRankQueries, LowRankQueries, DenseQueries]
    assert queries[0]["0"].L.shape == (2, 12, RANK) and queries[0]["0"].R.shape == (2, RANK, 15)
    tokens = [made(data, "identity", query_rank=RANK)._ready(batch, 0)["0"] for batch in data.tests]
    assert [own.R.shape[1] for own in tokens] == [RANK, 2], "five positions are cut, two are the factors"
    assert tokens[0].joined(tokens[1:]).R.shape == (5, RANK, 15)
    assert type(made(data, "identity")._ready(data.tests[0], 0)["0"]) is TokenQueries


def test_many_small_layers_stay_whole() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(9)))
    data = Batch(args=(torch.randn(7, 3, 12),), targets=torch.randint(12, (7, 3)))
    model = InfluenceModel(net, cross_entropy, progress=False)
    for curvature in (EKFACIHVP(model, [data], damping=DAMPING), METHODS["fisher"](model, [data], damping=DAMPING)):
        whole, cut = (FirstOrderInfluenceCalculator(model, [data], curvature, query_rank=rank) for rank in (None, 1))
        assert torch.equal(whole.scores([data]), cut.scores([data]))


def test_near_the_best_beyond_its_subspace_and_the_same_in_every_run() -> None:
    """Values that fall slowly, and the user's own random numbers go on as if nothing had been drawn."""
    torch.manual_seed(1)
    layer = next(iter(InfluenceModel(nn.Linear(90, 70, bias=False), cross_entropy).layers.values()))
    U, V = (torch.linalg.qr(torch.randn(3, n, 70, dtype=F64)).Q for n in (70, 90))
    P = U * torch.arange(1, 71, dtype=F64).pow(-0.5) @ V.mT
    state = torch.get_rng_state()
    one, other = (truncated(DenseQueries(P), layer, 16) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.dense(), other.dense())
    error, least = float((one.dense() - P).norm()), float((best(P, 16) - P).norm())
    assert least < error < 1.02 * least


def test_float32_to_rounding() -> None:
    data = wide()
    model = InfluenceModel(data.net.float(), cross_entropy, progress=False)
    train = [batch.map(lambda x: x.float() if x.is_floating_point() else x) for batch in batches(data.train, 4)]
    curvature = IdentityIHVP(model)
    got, want = (FirstOrderInfluenceCalculator(model, train, curvature, query_rank=r).scores(train) for r in (RANK, 12))
    assert got.dtype == torch.float32
    assert_near(got, want.double(), 1e-5)  # three positions


def test_no_queries_and_zero_ones() -> None:
    data = wide()
    calculator = made(data, "ekfac", query_rank=RANK)
    assert calculator.scores([rows(data.tests[0], slice(0))]).shape == (0, 9)
    hidden = Batch(args=data.tests[0].args, targets=data.tests[0].targets, mask=torch.zeros_like(data.tests[0].mask))
    assert not calculator.scores([hidden]).any()


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "full"])
def test_wrong_ranks_are_named(rank: Any) -> None:
    with pytest.raises(ValueError, match="query_rank must be None or a whole number > 0, got"):
        made(wide(), "identity", query_rank=rank)


def test_a_query_that_is_not_finite_names_the_layer() -> None:
    layer = next(iter(InfluenceModel(nn.Linear(90, 70), cross_entropy).layers.values()))
    with pytest.raises(FloatingPointError, match="layer '': a preconditioned query is not finite"):
        truncated(DenseQueries(torch.full((1, 70, 91), torch.nan)), layer, 2)
