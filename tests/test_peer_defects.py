"""One test for each defect known of other libraries, where this one has the part that could have it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ihvp import EKFACIHVP, KFACIHVP, Batch, ExactIHVP, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel
from ihvp.model import draw_classes
from nets import (
    F64,
    METHODS,
    Problem,
    assert_near,
    batches,
    chain,
    cross_entropy,
    dense_scores,
    flat,
    gradients,
    layer_tokens,
    pooled,
    random_vectors,
    rows,
    squared_error,
    tokens,
)
from torch import nn

DAMPING = 0.3
KRONECKER = ["kfac pi", "kfac even", "kfac none", "ekfac", "ekfac uncorrected"]


def model_of(net: nn.Module, loss_fn: Any = cross_entropy) -> InfluenceModel:
    return InfluenceModel(net.double(), loss_fn, progress=False)


def test_eigenvectors_are_columns() -> None:
    """U^T M U is diagonal, and U M U^T is not; solve and multiply rotate by the same U."""
    data = tokens()
    model = data.model()
    curvature = EKFACIHVP(model, [data.train])
    V = random_vectors(model)
    for name, factors in curvature.kfac_blocks.items():
        for U, M in zip(curvature.evecs[name], factors, strict=True):
            by_columns, by_rows = U.T @ M @ U, U @ M @ U.T
            assert_near(by_columns, by_columns.diagonal().diag())
            assert float((by_rows - by_rows.diagonal().diag()).norm()) > 0.1 * float(M.norm())
        U_A, U_G = curvature.evecs[name]
        rotated = U_G.T @ V[name] @ U_A
        assert_near(curvature.solve(V, DAMPING)[name], U_G @ (rotated / (curvature.evals[name] + DAMPING)) @ U_A.T)
        assert_near(curvature.multiply(V)[name], U_G @ (rotated * curvature.evals[name]) @ U_A.T)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_not_taken_for_granted(bias: bool, method: str) -> None:
    torch.manual_seed(0)
    model = model_of(chain(4, 3, 3, bias=bias))
    train = Batch(args=(torch.randn(20, 4, dtype=F64),), targets=torch.randint(3, (20,)))
    curvature = METHODS[method](model, [train], damping=DAMPING)
    got = FirstOrderInfluenceCalculator(model, [train], curvature).scores([train])
    g = flat(gradients(model, train))
    assert g.shape[1] == 3 * (4 + bias) + 3 * (3 + bias) == model.nb_params
    assert_near(got, dense_scores(METHODS[method].damped(model, train, DAMPING), g, g))


def test_weights_and_bias_are_not_scrambled() -> None:
    """Rows are outputs, columns inputs, the bias the last column: the gradients that autograd gives the parameters."""
    data = tokens()
    model = data.model()
    one = rows(data.train, slice(2, 3))
    V = IdentityIHVP(model).compute_ihvp([one])
    data_loss = torch.where(one.mask, cross_entropy(model.net(*one.args), one.targets), 0).sum()
    data_loss.backward()
    for name, layer in model.layers.items():
        parameters = layer.split(V[name][0])
        assert parameters.keys() == {f"{name}.weight", f"{name}.bias"}
        for key, value in parameters.items():
            assert_near(value, model.weights[key].grad)
        assert_near(V[name][0, :, :-1], model.weights[f"{name}.weight"].grad)
        assert torch.equal(layer.matrix()[:, -1], model.weights[f"{name}.bias"])


@pytest.mark.parametrize("problem", [tokens, pooled])
def test_squares_are_of_examples_not_of_positions(problem: Any) -> None:
    data: Problem = problem()
    model = data.model()
    curvature = EKFACIHVP(model, batches(data.train, 8))
    name = next(iter(model.layers))
    U_A, U_G = curvature.evecs[name]
    x, d = layer_tokens(model, data.train)[name]
    by_position = (d @ U_G).square().T @ (x @ U_A).square() / data.train.size
    by_example = (U_G.T @ gradients(model, data.train)[name] @ U_A).square().mean(0)
    assert float((by_position - by_example).norm()) > 0.05 * float(by_example.norm())
    assert_near(curvature.evals[name], by_example)


def test_sampled_targets_follow_probabilities_along_the_classes() -> None:
    """Not square roots of probabilities, and for (N,T,V) and (N,V,T) the softmax of classes, not of positions."""
    p = torch.tensor([[0.05, 0.25, 0.7], [0.8, 0.1, 0.1]], dtype=F64)  # of two positions
    logits = p.log().expand(20000, 2, 3)
    targets = torch.zeros(20000, 2, dtype=torch.long)
    for laid_out in (logits, logits.movedim(2, 1)):
        drawn = draw_classes(laid_out, targets, torch.Generator().manual_seed(0))
        frequencies = torch.stack([drawn[:, t].bincount(minlength=3) for t in range(2)]) / 20000
        assert_near(frequencies.double(), p, 0.02)


def test_no_activation_of_an_earlier_batch_is_used() -> None:
    """Batches of other dimensions and sizes one after the other give what each gives on its own."""
    torch.manual_seed(0)
    model = model_of(chain(4, 5, 3))
    data = [
        Batch(args=(torch.randn(*shape, 4, dtype=F64),), targets=torch.randint(3, shape))
        for shape in ((5,), (5, 6), (5, 1), (2, 6), (5,))
    ]
    identity = IdentityIHVP(model)
    together = identity.compute_ihvp(data)
    for name in model.layers:
        assert_near(together[name], torch.cat([gradients(model, batch)[name] for batch in data]))


@pytest.mark.parametrize("method", METHODS)
def test_an_activation_of_zero_keeps_its_bias_gradient(method: str) -> None:
    """delta is captured, not recovered by dividing the weight gradient by the activation."""
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(4, 3)))
    train = Batch(args=(torch.zeros(9, 4, dtype=F64),), targets=torch.randint(3, (9,)))
    curvature = METHODS[method](model, [train], damping=DAMPING)
    got = FirstOrderInfluenceCalculator(model, [train], curvature).scores([train])
    g = flat(gradients(model, train))
    assert float(g.norm()) > 1
    assert_near(got, dense_scores(METHODS[method].damped(model, train, DAMPING), g, g))


def padded(batch: Batch, by: int, fill: float) -> Batch:
    (x,), N = batch.args, batch.size
    return Batch(
        args=(torch.cat([x, torch.full((N, by, x.shape[2]), fill, dtype=x.dtype)], dim=1),),
        targets=torch.cat([batch.targets, torch.zeros(N, by, dtype=torch.long)], dim=1),
        mask=torch.cat([batch.mask, torch.zeros(N, by, dtype=torch.bool)], dim=1),
    )


# Automatic differentiation of the whole net meets what padding holds; the captured tokens of it are never read.
FILLS = [
    *((method, 1e3) for method in METHODS),
    *((method, fill) for method, own in METHODS.items() if own.cls is not ExactIHVP for fill in (math.inf, math.nan)),
]


@pytest.mark.parametrize(("method", "fill"), FILLS)
def test_padded_positions_do_not_count(method: str, fill: float) -> None:
    """However much padding there is and whatever it holds, factors, solutions and scores stay."""
    data = tokens()
    model = data.model()
    results = []
    for by in (0, 3):
        train, *tests = (padded(batch, by, fill) for batch in (data.train, *data.tests))
        curvature = METHODS[method](model, batches(train, 8), damping=DAMPING)
        calculator = FirstOrderInfluenceCalculator(model, batches(train, 8), curvature, normalize="theta")
        results.append(
            {
                "solve": flat(curvature.solve(random_vectors(model))),
                "scores": calculator.scores(tests),
                "self_scores": calculator.self_scores(),
                "group": next(calculator.estimate_influence_values_group([[train]])),
                **{f"A {name}": A for name, (A, _) in getattr(curvature, "kfac_blocks", {}).items()},
            }
        )
    for name, want in results[0].items():
        assert_near(results[1][name], want)


@pytest.mark.parametrize("method", ["diagonal", "fisher", "kfac none", "ekfac"])
def test_sampled_targets_at_padding_do_not_count(method: str) -> None:
    """Positions that the loss ignores stay ignored when targets are drawn, by mask or by a target of -100."""
    data = tokens(60)
    model = data.model()
    ignored = Batch(args=data.train.args, targets=torch.where(data.train.mask, data.train.targets, -100))
    V = random_vectors(model)
    by_mask, by_target = (METHODS[method](model, [batch], fisher="sampled") for batch in (data.train, ignored))
    if method in ("diagonal", "fisher"):
        assert_near(flat(by_mask.multiply(V)), flat(by_target.multiply(V)))
    else:  # G does not know positions that count for nothing; A counts those that only the loss ignores
        for name, (_, G) in by_mask.kfac_blocks.items():
            assert_near(by_target.kfac_blocks[name][1], G)


@pytest.mark.parametrize("method", ["diagonal", "kfac pi", "kfac none", "ekfac"])
def test_each_layer_has_its_own_automatic_damping(method: str) -> None:
    """Layers whose gradients differ by a factor of a million."""
    torch.manual_seed(0)
    net = chain(4, 3, 3)
    with torch.no_grad():
        net[0].weight *= 1e-3  # small activations for the second layer
        net[2].weight *= 1e-3  # small deltas for the first
    model = model_of(net)
    train = Batch(args=(torch.randn(20, 4, dtype=F64),), targets=torch.randint(3, (20,)))
    curvature = METHODS[method](model, [train], damping="auto")
    V = random_vectors(model)
    means = {name: float(Lambda.mean()) for name, Lambda in curvature.evals.items()}
    assert max(means.values()) > 1e4 * min(means.values())
    for name, mean in means.items():
        assert_near(curvature.solve(V)[name], curvature.solve(V, damping=0.1 * mean)[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_solve_changes_nothing(method: str) -> None:
    """Neither the object nor the vectors: solving twice, with other dampings between, gives the same bits."""
    data = tokens()
    model = data.model()
    curvature = METHODS[method](model, [data.train], damping=DAMPING)
    V = random_vectors(model)
    first = curvature.solve(V)
    before = {name: x.clone() for name, x in curvature.state_dict().items()}
    for damping in (10.0, "auto", [1.0, 2.0]):
        curvature.solve(V, damping=damping)
    curvature.multiply(V)
    calculator = FirstOrderInfluenceCalculator(model, [data.train], curvature, normalize=True)
    calculator.scores(data.tests)
    assert all(torch.equal(x, before[name]) for name, x in curvature.state_dict().items())
    again = curvature.solve(V)
    for name, x in random_vectors(model).items():
        assert torch.equal(V[name], x)
        assert torch.equal(again[name], first[name])


def test_sums_of_a_bfloat16_model_do_not_stall() -> None:
    """In bfloat16, 1 + 1 + ... stops at 256. In float32 a thousand equal terms round alike, by some 1e-5 in all."""
    N = 3000
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    model = InfluenceModel(net, lambda outputs, targets: cross_entropy(outputs.float(), targets), progress=False)
    x = torch.randn(1, 4).bfloat16()
    train = Batch(args=(x.expand(N, 4),), targets=torch.zeros(N, dtype=torch.long))
    one = EKFACIHVP(model, [rows(train, slice(1))])
    for size in (1000, 3000):
        many = EKFACIHVP(model, batches(train, size))
        for name in model.layers:
            for got, want in zip(many.kfac_blocks[name], one.kfac_blocks[name], strict=True):
                assert_near(got, want, 1e-4)
            assert_near(many.evals[name].sum(), one.evals[name].sum(), 1e-4)
        written_out = torch.cat([x.double(), torch.ones(1, 1)], dim=1)
        assert_near(many.kfac_blocks["0"][0], written_out.T @ written_out, 1e-4)


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.net(*args)


@pytest.mark.parametrize("method", ["kfac pi", "ekfac", "fisher"])
def test_training_gradients_are_computed_once_for_all_queries(method: str) -> None:
    """One forward pass for each query batch, one for each training batch: not their product."""
    data = tokens()
    net = Counted(data.net)
    model = InfluenceModel(net, data.loss_fn, progress=False)
    train = batches(data.train, 8)
    curvature = METHODS[method](model, train, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature)
    calls = {
        "scores": lambda: calculator.scores(data.tests),
        "top_k": lambda: list(calculator.top_k(data.tests, k=2)),
    }
    for name, call in calls.items():
        net.calls = 0
        call()
        assert net.calls == len(data.tests) + len(train), name


def duplicated() -> Iterator[tuple[str, nn.Module, Batch]]:
    torch.manual_seed(0)
    x, targets = torch.randn(12, 6), torch.randint(3, (12,))
    x[:, 3:] = x[:, :3]  # features that are copies
    x[:, 0] = x[:, 3] = 0  # and features that are never on
    yield "copied and dead features", chain(6, 5, 3), Batch(args=(x,), targets=targets)
    yield (
        "one example again and again",
        chain(6, 5, 3),
        Batch(args=(x[:1].expand(12, 6),), targets=targets[:1].expand(12)),
    )
    net = chain(6, 5, 3, between=nn.ReLU)
    with torch.no_grad():
        net[0].bias[:4] = -1e3  # dead units
    yield "dead units", net, Batch(args=(x,), targets=targets)
    yield "wider than there are examples", chain(6, 40, 3), Batch(args=(x[:3],), targets=targets[:3])


@pytest.mark.parametrize("method", KRONECKER)
def test_factors_may_be_rank_deficient(method: str) -> None:
    for name, net, train in duplicated():
        model = InfluenceModel(net.float(), cross_entropy, progress=False)
        curvature = METHODS[method](model, [train], damping=1e-3)
        V = random_vectors(model)
        assert all(x.isfinite().all() for x in curvature.solve(V).values()), name
        assert all((Lambda >= 0).all() for Lambda in curvature.evals.values()), name
        if method not in ("kfac pi", "kfac even"):
            P = curvature.solve(V)
            assert_near(flat(curvature.multiply(P)) + 1e-3 * flat(P), flat(V), 1e-3)


def test_a_layer_without_gradient_can_be_diagonalised() -> None:
    """A perfect fit: G = 0. The damping alone is inverted."""
    net = nn.Sequential(nn.Linear(4, 3))
    model = InfluenceModel(net, squared_error, progress=False)
    x = torch.randn(9, 4)
    curvature = EKFACIHVP(model, [(x, net(x).detach())], damping=0.5)
    V = random_vectors(model)
    assert_near(curvature.solve(V)["0"], 2 * V["0"])


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("method", ["identity", "diagonal", "fisher", "ekfac", "kfac none", "hessian", "gauss_newton"])
def test_sign_and_scale_by_hand(method: str, copies: int) -> None:
    """f(x) = w x with w = 2, loss (f - y)^2 / 2, training data (x,y) = (1,1), (3,7): g = (f - y) x = 1, -3.

    F is a mean over examples, so that copies of the data change nothing, and no score holds a factor 1/N.
    """
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(2.0)
    model = model_of(net, squared_error)
    x, y = torch.tensor([[1.0], [3.0]], dtype=F64), torch.tensor([[1.0], [7.0]], dtype=F64)
    g = torch.tensor([1.0, -3.0], dtype=F64)
    fisher = (1 + 9) / 2
    F = {
        "identity": 1,
        "hessian": (1 + 9) / 2,  # mean of x^2
        "gauss_newton": (1 + 9) / 2,
        "kfac none": (1 + 9) / 2 * (1 + 1) / 2,  # A = mean of x^2, G = mean of (f - y)^2
    }.get(method, fisher)
    query = (torch.tensor([[2.0]], dtype=F64), torch.tensor([[3.0]], dtype=F64))  # g = (4 - 3) 2 = 2
    loader = [(x.repeat(copies, 1), y.repeat(copies, 1))]
    curvature = METHODS[method](model, loader, damping=0.25)
    score = 2 * g / (F + 0.25)
    for sign, factor in {"proponent": 1, "loss_change": -1}.items():
        calculator = FirstOrderInfluenceCalculator(model, loader, curvature, sign=sign)
        assert_near(calculator.scores([query]), factor * score.repeat(copies)[None])
        assert_near(calculator.self_scores(), factor * (g.square() / (F + 0.25)).repeat(copies))
    assert isinstance(curvature, METHODS[method].cls)


def test_pi_is_the_one_of_the_printed_formula() -> None:
    """G + sqrt(damping)/pi I and A + pi sqrt(damping) I with pi^2 = (tr A / dim A) / (tr G / dim G), on one number."""
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(2.0)
    model = model_of(net, squared_error)
    loader = [(torch.tensor([[4.0]], dtype=F64), torch.tensor([[7.0]], dtype=F64))]  # A = 16, G = 1, pi = 4
    V = {"": torch.ones(1, 1, 1, dtype=F64)}
    for split, want in {"pi": (16 + 4 * 0.5) * (1 + 0.5 / 4), "even": 16.5 * 1.5, "none": 16.25}.items():
        got = KFACIHVP(model, loader, damping=0.25, split=split).solve(V)[""]
        assert_near(got, torch.full((1, 1, 1), 1 / want, dtype=F64))
