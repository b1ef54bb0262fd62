"""The first-order calculator against g_q^T (F + damping I)^-1 g_n written out, and against retraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ihvp
import pytest
import torch
from ihvp import (
    EKFACIHVP,
    Batch,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    Order,
)
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
    plain,
    pooled,
    rows,
    squared_error,
    tokens,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

DAMPING = 0.3


class Dense:
    """A problem with its calculator and, from the definitions, the matrices that the calculator must agree with."""

    def __init__(self, problem: str | Problem, method: str, **options: Any) -> None:
        own = METHODS[method]
        self.data = PROBLEMS[problem]() if isinstance(problem, str) else problem
        self.model = self.data.model()
        self.train = batches(self.data.train, 8)  # the last is smaller
        self.damped = own.damped(self.model, self.data.train, DAMPING)
        self.g_train = flat(gradients(self.model, self.data.train))
        self.g_tests = [flat(gradients(self.model, batch)) for batch in self.data.tests]
        self.g_test = torch.cat(self.g_tests)
        curvature = own(self.model, self.train, damping=DAMPING)
        self.calculator = FirstOrderInfluenceCalculator(self.model, self.train, curvature, **options)

    @property
    def scores(self) -> Tensor:
        return dense_scores(self.damped, self.g_test, self.g_train)

    @property
    def self_scores(self) -> Tensor:
        return dense_scores(self.damped, self.g_train, self.g_train).diagonal()

    @property
    def norms(self) -> dict[Any, Tensor]:
        """What RelatIF divides by."""
        theta = torch.linalg.solve(self.damped, self.g_train.T).norm(dim=0)
        return {False: torch.ones(len(theta)), True: theta, "theta": theta, "loss": self.self_scores.sqrt()}


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


# --- the other ways to ask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, "theta"])
def test_values_in_batches(normalize: bool | str) -> None:
    dense = Dense("tokens", "ekfac", normalize=normalize)
    want = (dense.scores / dense.norms[normalize]).split([batch.size for batch in dense.data.tests])
    found = list(dense.calculator.estimate_influence_values_in_batches(dense.data.tests))
    assert [batch for batch, _ in found] == list(dense.data.tests)
    for (_, inner), own in zip(found, want, strict=True):
        pairs = list(inner)
        assert [batch for batch, _ in pairs] == dense.train
        assert_near(torch.cat([scores for _, scores in pairs], dim=1), own)
        assert [scores.shape[1] for _, scores in pairs] == [batch.size for batch in dense.train]


def test_values_in_batches_are_computed_as_they_are_asked_for() -> None:
    dense = Dense("tokens", "identity")
    read: list[int] = []

    def loader(data: list[Batch]) -> Iterator[Batch]:
        for i, batch in enumerate(data):
            read.append(i)
            yield batch

    _, inner = next(dense.calculator.estimate_influence_values_in_batches(dense.data.tests, loader(dense.train)))
    assert read == []
    next(inner)
    assert read == [0]
    values = dense.calculator.compute_influence_values(loader(dense.train))
    assert read == [0]
    next(values)
    assert read == [0, 0]


def test_influence_values() -> None:
    dense = Dense("pooled", "ekfac")
    found = list(dense.calculator.compute_influence_values(dense.train))
    assert [batch for batch, _ in found] == dense.train
    assert_near(torch.cat([values for _, values in found]), dense.self_scores)


@pytest.mark.parametrize("k", [1, 3, 29])
@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(("problem", "normalize"), [("tokens", False), ("plain", "loss")])
def test_top_k_is_that_of_the_scores(problem: str, normalize: bool | str, order: Order, k: int) -> None:
    dense = Dense(problem, "ekfac", normalize=normalize)
    want = (dense.scores / dense.norms[normalize]).topk(k, largest=order is Order.DESCENDING)
    found = list(dense.calculator.top_k(dense.data.tests, dense.train, k=k, order=order))
    assert [batch for batch, _, _ in found] == list(dense.data.tests)
    for batch, values, indices in found:
        assert values.shape == indices.shape == (batch.size, k)
    assert_near(torch.cat([values for _, values, _ in found]), want.values)
    assert torch.equal(torch.cat([indices for _, _, indices in found]), want.indices)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("k", [1, 4, 29])
def test_top_k_of_the_training_data(order: Order, k: int) -> None:
    dense = Dense("tokens", "ekfac")
    values, indices = dense.calculator.compute_top_k_from_training_dataset(dense.train, k, order)
    want = dense.self_scores.topk(k, largest=order is Order.DESCENDING)
    assert values.shape == indices.shape == (k,)
    assert_near(values, want.values)
    assert torch.equal(indices, want.indices)


class Shapes(TorchDispatchMode):
    """Every shape that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.seen.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("method", ["identity", "kfac pi", "ekfac"])
def test_top_k_never_holds_all_scores(method: str) -> None:
    """No tensor has a dimension of the N = 211 training examples, or Q N entries."""
    data = plain(211)
    model = data.model()
    train = batches(data.train, 16)
    curvature = METHODS[method](model, train, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature, normalize="theta")
    with Shapes() as shapes:
        found = list(calculator.top_k(data.tests, train, k=3))
    assert (7, 16) in shapes.seen  # the mode sees the blocks of scores
    assert not [shape for shape in shapes.seen if 211 in shape or torch.Size(shape).numel() >= 7 * 211]
    with Shapes() as shapes:
        scores = calculator.scores(data.tests, train)
    assert (7, 211) in shapes.seen
    assert torch.equal(torch.cat([indices for _, _, indices in found]), scores.topk(3).indices)


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


# --- sign and scale ----------------------------------------------------------------------------------------------


def everything(calculator: FirstOrderInfluenceCalculator, data: Problem) -> dict[str, Tensor]:
    train = calculator.train_loader
    tops = [list(calculator.top_k(data.tests, train, k=29, order=order)) for order in Order]
    in_batches = calculator.estimate_influence_values_in_batches(data.tests)
    return {
        "scores": calculator.scores(data.tests),
        "self_scores": calculator.self_scores(),
        "values": torch.cat([values for _, values in calculator.compute_influence_values()]),
        "in_batches": torch.cat([torch.cat([scores for _, scores in inner], dim=1) for _, inner in in_batches]),
        "group": torch.cat(list(calculator.estimate_influence_values_group([train], [data.tests]))),
        "top_k": torch.cat([torch.cat([values.sort(1).values for _, values, _ in found]) for found in tops]),
        "top_k_train": calculator.compute_top_k_from_training_dataset(k=29)[0].sort().values,
    }


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


# --- loaders and callers -----------------------------------------------------------------------------------------


def test_an_unfitted_curvature_is_fitted_with_the_training_data() -> None:
    data = plain()
    model = data.model()
    train = batches(data.train, 8)
    curvature = EKFACIHVP(model, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature)
    assert curvature.is_fitted
    fitted = FirstOrderInfluenceCalculator(model, None, EKFACIHVP(model, train, damping=DAMPING))
    assert torch.equal(calculator.scores(data.tests), fitted.scores(data.tests, train))


def test_a_fitted_curvature_is_not_fitted_again() -> None:
    data = plain()
    model = data.model()
    curvature = EKFACIHVP(model, data.tests, damping=DAMPING)
    before = curvature.evals
    FirstOrderInfluenceCalculator(model, batches(data.train, 8), curvature)
    assert all(curvature.evals[name] is x for name, x in before.items())


def test_another_loader_may_be_given_to_each_call() -> None:
    dense = Dense("plain", "ekfac")
    few = dense.train[2:]
    assert_near(dense.calculator.scores(dense.data.tests, few), dense.scores[:, 16:])
    assert_near(dense.calculator.self_scores(few), dense.self_scores[16:])
    indices = torch.cat([found for _, _, found in dense.calculator.top_k(dense.data.tests, few, k=2)])
    assert torch.equal(indices, dense.scores[:, 16:].topk(2).indices)


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, data: TensorDataset) -> None:
        super().__init__()
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


def test_a_data_loader_of_a_stream() -> None:
    dense = Dense("plain", "ekfac")
    stream = Stream(TensorDataset(dense.data.train.args[0], dense.data.train.targets))
    loader = DataLoader(stream, batch_size=10)
    curvature = EKFACIHVP(dense.model, loader, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(dense.model, loader, curvature)
    assert_near(calculator.scores(dense.data.tests), dense.scores)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["identity", "fisher", "kfac pi", "ekfac"])
def test_caller_may_have_switched_gradients_off(method: str, caller: Callable[[], Any]) -> None:
    dense = Dense("tokens", method, normalize="theta")
    want = everything(dense.calculator, dense.data)
    with caller():
        got = everything(dense.calculator, dense.data)
    for name, value in want.items():
        assert_near(got[name], value)


def test_nothing_is_left_on_the_net() -> None:
    dense = Dense("pooled", "ekfac", normalize="loss")
    dense.data.net.train()
    everything(dense.calculator, dense.data)
    assert dense.data.net.training
    for module in dense.data.net.modules():
        assert not module._forward_hooks and not module._backward_hooks
    assert all(p.grad is None and p.requires_grad for p in dense.data.net.parameters())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_can_be_switched(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    data = plain()
    model = InfluenceModel(data.net, data.loss_fn, progress=progress)
    FirstOrderInfluenceCalculator(model, [data.train], EKFACIHVP(model, [data.train])).scores(data.tests)
    out, err = capsys.readouterr()
    assert out == "" and bool(err) == progress
    assert all(pass_ in err for pass_ in ("covariances", "eigenvalues", "queries", "scores")) == progress


# --- the seed's example ------------------------------------------------------------------------------------------


def test_the_guides_complete_example() -> None:
    """Its section 7, on torch: an MLP of which only `hidden` to `classifier` are watched."""
    torch.manual_seed(42)
    net = nn.Sequential()
    for name, module in {
        "feature_extractor": nn.Linear(100, 64),
        "relu_1": nn.ReLU(),
        "hidden": nn.Linear(64, 32),
        "relu_2": nn.ReLU(),
        "classifier": nn.Linear(32, 10),
    }.items():
        net.add_module(name, module)
    X_train, y_train = torch.randn(100, 100), torch.randint(10, (100,))
    X_test, y_test = torch.randn(10, 100), torch.randint(10, (10,))
    train_dataset = DataLoader(TensorDataset(X_train, y_train), batch_size=32)
    test_dataset = DataLoader(TensorDataset(X_test, y_test), batch_size=10)
    hessian_dataset = DataLoader(TensorDataset(X_train[:50], y_train[:50]), batch_size=8)

    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(5):
        for x, y in train_dataset:
            optimizer.zero_grad()
            cross_entropy(net(x), y).mean().backward()
            optimizer.step()

    def process_batch_for_loss(batch: tuple[Tensor, Tensor]) -> Batch:
        inputs, labels = batch
        return Batch(args=(inputs,), targets=labels, weights=torch.ones_like(labels, dtype=torch.float32))

    influence_model = InfluenceModel(
        net,
        nn.CrossEntropyLoss(reduction="none"),
        start_layer="hidden",
        last_layer="classifier",
        process_batch=process_batch_for_loss,
        progress=False,
    )
    assert influence_model.nb_params == 65 * 32 + 33 * 10
    assert list(influence_model.weights) == [
        f"{name}.{key}" for name in ("hidden", "classifier") for key in ("weight", "bias")
    ]
    curvature = EKFACIHVP(influence_model, hessian_dataset, damping=1e-3, update_eigen=True)
    for name, (O, I) in {"hidden": (32, 65), "classifier": (10, 33)}.items():
        A, G = curvature.kfac_blocks[name]
        assert A.shape == (I, I) and G.shape == (O, O) and curvature.evals[name].shape == (O, I)
    calculator = FirstOrderInfluenceCalculator(influence_model, train_dataset, curvature)
    found = list(calculator.top_k(test_dataset, train_dataset, k=5, order=ihvp.Order.DESCENDING))
    assert len(found) == 1
    (test_inputs, test_labels), influence_values, train_samples = found[0]
    assert torch.equal(test_inputs, X_test) and torch.equal(test_labels, y_test)
    assert influence_values.shape == train_samples.shape == (10, 5)
    assert all((earlier >= later).all() for earlier, later in pairwise(influence_values.T))

    # The same answer from the definitions, in float64.
    net.double()
    train, test = (Batch(args=(x.double(),), targets=y) for x, y in ((X_train, y_train), (X_test, y_test)))
    g_hessian, g_train, g_test = (gradients(influence_model, batch) for batch in (rows(train, slice(50)), train, test))
    scores = torch.zeros(10, 100, dtype=F64)
    for name in influence_model.layers:
        U_A, U_G = (U.double() for U in curvature.evecs[name])
        rotated = [U_G.T @ g[name] @ U_A for g in (g_hessian, g_train, g_test)]
        weight = 1 / (rotated[0].square().mean(0) + 1e-3)
        scores += (rotated[2] * weight).flatten(1) @ rotated[1].flatten(1).T
    assert_near(influence_values.double(), scores.gather(1, train_samples), 1e-4)
    assert_near(scores.gather(1, train_samples), scores.topk(5).values, 1e-4)
