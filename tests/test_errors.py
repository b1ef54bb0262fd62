"""Wrong input: the exception names the argument or the layer, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ihvp
import pytest
import torch
from ihvp import (
    EKFACIHVP,
    KFACIHVP,
    Batch,
    DiagonalIHVP,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    FisherIHVP,
    IdentityIHVP,
    InfluenceModel,
    Order,
)
from nets import F64, METHODS, Pooled, assert_near, batches, chain, cross_entropy, plain, random_vectors, tokens
from safetensors.torch import save_file
from torch import Tensor, nn

N = 6
FITTED = [name for name in METHODS if name != "identity"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def model(net: nn.Module | None = None, loss_fn: Any = cross_entropy, **options: Any) -> InfluenceModel:
    return InfluenceModel(chain(4, 5, 3) if net is None else net, loss_fn, progress=False, **options)


def data(N: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def sequences(**changes: Any) -> Batch:
    return replace(Batch(args=(torch.randn(N, 4, 4),), targets=torch.randint(3, (N, 4))), **changes)


def check(call: Callable[[], Any], error: type[BaseException] | tuple[type[BaseException], ...], match: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.search(match, str(caught.value), re.DOTALL), f"{caught.value!r} does not match {match!r}"


Case = tuple[Callable[[], Any], type[BaseException], str]

# --- InfluenceModel ----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Two layers that share a weight but not a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


def embedded() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))


MODELS: dict[str, Case] = {
    "net": (lambda: model("net"), TypeError, r"^net must be a torch\.nn\.Module, got str"),
    "loss_fn": (lambda: model(loss_fn=3), TypeError, r"^loss_fn must be callable, got int"),
    "process_batch": (lambda: model(process_batch=3), TypeError, r"process_batch must be callable, got int"),
    "sample_targets": (lambda: model(sample_targets=3), TypeError, r"sample_targets must be callable, got int"),
    "unsupported layer": (
        lambda: model(embedded()),
        TypeError,
        r"'0' \(Embedding\).*Supported types: Linear.*layers=\['1'\].*ihvp/layers",
    ),
    "unsupported layer asked for": (lambda: model(embedded(), layers=["*"]), TypeError, r"'0' \(Embedding\)"),
    "a name that does not exist": (
        lambda: model(layers=["0", "head"]),
        ValueError,
        r"^layers: no module of name or pattern 'head'; the net has '0', '2'",
    ),
    "a pattern without a match": (lambda: model(layers=["blocks.*"]), ValueError, r"pattern 'blocks\.\*'.*'0', '2'"),
    "a type without a match": (lambda: model(layers=[nn.Conv2d]), ValueError, r"no module of type Conv2d.*'0', '2'"),
    "a module without parameters": (lambda: model(layers=["1"]), ValueError, r"no module of name or pattern '1'"),
    "no layers": (lambda: model(layers=[]), ValueError, r"^layers"),
    "a string for a list of names": (lambda: model(layers="0"), TypeError, r"^layers must be .*(sequence|list).*'0'"),
    "a type for a list of types": (lambda: model(layers=nn.Linear), TypeError, r"^layers must be .*(sequence|list)"),
    "a number for a name": (lambda: model(layers=[3]), TypeError, r"^layers must .*names.*types.*3"),
    "no parameters": (lambda: model(nn.Tanh()), ValueError, r"no module with parameters"),
    "start_layer": (
        lambda: model(start_layer="head"),
        ValueError,
        r"^start_layer 'head' is not a tracked layer; they are '0', '2'",
    ),
    "last_layer": (lambda: model(last_layer="1"), ValueError, r"^last_layer '1' is not a tracked layer"),
    "start_layer out of range": (lambda: model(start_layer=2), ValueError, r"^start_layer 2 is out of range for 2"),
    "last_layer out of range": (lambda: model(last_layer=-3), ValueError, r"^last_layer -3 is out of range for 2"),
    "start_layer of another type": (lambda: model(start_layer=0.5), TypeError, r"start_layer.*0\.5"),
    "start after last": (
        lambda: model(start_layer="2", last_layer=0),
        ValueError,
        r"start_layer '2' comes after last_layer '0'",
    ),
    "layers that share a part": (lambda: model(Halves()), TypeError, r"'one' and 'two' share a parameter"),
    "one of two layers that share": (
        lambda: model(nn.ModuleList([layer := nn.Linear(4, 4), tied(layer)]), layers=["0"]),
        TypeError,
        r"'0' and '1' share a parameter",
    ),
}


def tied(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.weight, other.bias = layer.weight, layer.bias
    return other


# --- Batch and what a loader yields ------------------------------------------------------------------------------

x, y = data()

BATCHES: dict[str, Case] = {
    "mask of one dimension": (
        lambda: sequences(mask=torch.ones(N)),
        ValueError,
        r"^mask must be \(N,T\) with N=6, got \(6,\)",
    ),
    "mask of other examples": (
        lambda: sequences(mask=torch.ones(4, 4)),
        ValueError,
        r"^mask must be \(N,T\) with N=6, got \(4, 4\)",
    ),
    "mask of weights": (lambda: sequences(mask=torch.full((N, 4), 0.5)), ValueError, r"^mask must hold only 0 and 1"),
    "mask of a list": (lambda: sequences(mask=[[1, 0, 0, 0]] * N), TypeError, r"mask must be .*[Tt]ensor.*list"),
    "weights": (
        lambda: sequences(weights=torch.ones(N, 4)),
        ValueError,
        r"^weights must be \(N,\) = \(6,\), got \(6, 4\)",
    ),
    "weights of a list": (lambda: sequences(weights=[1.0] * N), TypeError, r"weights must be .*[Tt]ensor.*list"),
    "a tensor for args": (lambda: Batch(args=x, targets=y), TypeError, r"args must be a tuple.*Tensor"),
    "no tensor": (
        lambda: Batch(args=(3,)),
        ValueError,
        r"batch must hold a tensor whose first dimension is the example",
    ),
    "a triple": (
        lambda: model().batch((x, y, y)),
        TypeError,
        r"pair \(inputs, targets\) or an ihvp\.Batch, got tuple of length 3; process_batch",
    ),
    "a tensor": (lambda: model().batch(x), TypeError, r"pair \(inputs, targets\) or an ihvp\.Batch, got Tensor"),
    "a dict": (lambda: model().batch({"x": x}), TypeError, r"pair .*got dict; process_batch"),
}

# --- the loss and the capture of a batch -------------------------------------------------------------------------


def scores_of(batch: Any, net: nn.Module | None = None, loss_fn: Any = cross_entropy, **options: Any) -> Tensor:
    own = model(net, loss_fn, **options)
    return FirstOrderInfluenceCalculator(own, [batch], IdentityIHVP(own)).scores([batch])


class Reshaped(nn.Module):
    """A layer whose input has all positions in its first dimension, or half as many positions as the mask."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.inner = shape, nn.Linear(shape[-1], shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(self.shape)).reshape(x.shape)


def broken_at(*examples: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        bad = torch.isin(torch.arange(len(targets)), torch.tensor(examples))
        return torch.where(bad, torch.nan, cross_entropy(outputs, targets))

    return loss_fn


PER_EXAMPLE = r"^loss_fn must return one loss per example \(N,\) or per position \(N,T\) with N=6, got "
CAPTURES: dict[str, Case] = {
    "a reduced loss": (
        lambda: scores_of((x, y), loss_fn=nn.CrossEntropyLoss()),
        ValueError,
        PER_EXAMPLE + r'a scalar; .*reduction="none"',
    ),
    "a loss of other examples": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: outputs.sum(0)),
        ValueError,
        PER_EXAMPLE + r"\(3,\)",
    ),
    "a loss of three dimensions": (
        lambda: scores_of(sequences(), loss_fn=lambda outputs, targets: outputs),
        ValueError,
        PER_EXAMPLE + r"\(6, 4, 3\)",
    ),
    "a loss that is no tensor": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: 0.5),
        TypeError,
        r"^loss_fn must return a tensor, got float",
    ),
    "a loss that is not finite": (
        lambda: scores_of((x, y), loss_fn=broken_at(1, 4)),
        FloatingPointError,
        r"loss of batch 0 is not finite at examples \[1, 4\]",
    ),
    "a mask of other positions than the loss": (
        lambda: scores_of(sequences(mask=torch.ones(N, 3))),
        ValueError,
        r"^mask must be \(N,T\) = \(6, 4\) as the loss, got \(6, 3\)",
    ),
    "a mask of other positions than a layer": (
        lambda: scores_of(
            sequences(mask=torch.ones(N, 4)), Reshaped((N, 2, 8)), lambda outputs, targets: outputs.sum(2)
        ),
        ValueError,
        r"^mask must be \(N,T\) with T=2.* layer 'inner', got \(6, 4\)",
    ),
    "examples that are not the first dimension": (
        lambda: scores_of(sequences(), Reshaped((N * 4, 4)), lambda outputs, targets: outputs.sum((1, 2))),
        ValueError,
        r"layer 'inner' got an input of shape \(24, 4\).* N=6.*first dimension must be the example",
    ),
    "no layer reaches the loss": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: torch.ones(N)),
        ValueError,
        r"no tracked layer reaches the loss; tracked: '0', '2'",
    ),
}

# --- IHVP objects ------------------------------------------------------------------------------------------------

torch.manual_seed(0)
own = model()
loader = [(x, y)]
ekfac = EKFACIHVP(own, loader)
V = random_vectors(own)


METHOD_ARGUMENTS: dict[str, Case] = {
    "model": (
        lambda: EKFACIHVP(chain(4, 3), loader),
        TypeError,
        r"^model must be an ihvp\.InfluenceModel, got Sequential",
    ),
    "negative damping": (
        lambda: EKFACIHVP(own, damping=-1e-3),
        ValueError,
        r"^damping must be .*not negative, got -0\.001",
    ),
    "infinite damping": (lambda: KFACIHVP(own, damping=float("inf")), ValueError, r"^damping must be finite.*inf"),
    "damping that is no number": (
        lambda: FisherIHVP(own, damping=float("nan")),
        ValueError,
        r"^damping must be finite.*nan",
    ),
    "damping by another word": (
        lambda: EKFACIHVP(own, damping="mean"),
        TypeError,
        r'^damping must be a number or "auto".*mean',
    ),
    "damping of None": (lambda: DiagonalIHVP(own, damping=None), TypeError, r"^damping must be a number.*None"),
    "damping of a bool": (lambda: IdentityIHVP(own, damping=True), TypeError, r"^damping must be a number.*True"),
    "fisher": (
        lambda: EKFACIHVP(own, fisher="true"),
        ValueError,
        r"^fisher must be one of empirical, sampled, got 'true'",
    ),
    "split": (lambda: KFACIHVP(own, split="odd"), ValueError, r"^split must be one of pi, even, none, got 'odd'"),
    "curvature": (
        lambda: ExactIHVP(own, curvature="true"),
        ValueError,
        r"^curvature must be one of hessian, gauss_newton, fisher, got 'true'",
    ),
    "rcond": (lambda: ExactIHVP(own, rcond=1.5), ValueError, r"^rcond must be in \[0, 1\), got 1\.5"),
    "a loader and a train_hessian": (
        lambda: ExactIHVP(own, loader, train_hessian=torch.eye(own.nb_params)),
        ValueError,
        r"hessian_loader or train_hessian, not both",
    ),
    "train_hessian of another shape": (
        lambda: ExactIHVP(own, train_hessian=torch.eye(7)),
        ValueError,
        r"train_hessian.* must be \(43, 43\), got \(7, 7\)",
    ),
    "solve: a layer missing": (
        lambda: ekfac.solve({"0": V["0"]}),
        ValueError,
        r"^V must map every tracked layer to \(Q,O,I'\): '0', '2'; got '0'",
    ),
    "solve: a layer more": (
        lambda: ekfac.solve({**V, "head": V["0"]}),
        ValueError,
        r"every tracked layer.*got '0', '2', 'head'",
    ),
    "solve: a tensor": (lambda: ekfac.solve(V["0"]), ValueError, r"^V must map every tracked layer.*got Tensor"),
    "solve: another shape": (
        lambda: ekfac.solve({**V, "2": V["2"].mT}),
        ValueError,
        r"^V\['2'\] must be \(Q,O,I'\) with O=3, I'=6.*got \(4, 6, 3\)",
    ),
    "solve: no dimension Q": (
        lambda: ekfac.solve({k: v[0] for k, v in V.items()}),
        ValueError,
        r"V\['0'\] must be \(Q,O,I'\)",
    ),
    "solve: several Q": (
        lambda: ekfac.multiply({**V, "2": V["2"][:1]}),
        ValueError,
        r"must be \(Q,O,I'\).*one Q for all layers",
    ),
    "solve: negative damping": (
        lambda: ekfac.solve(V, damping=-1.0),
        ValueError,
        r"^damping must be .*not negative, got -1",
    ),
    "solve: one of several dampings": (
        lambda: ekfac.solve(V, damping=[1.0, -1.0]),
        ValueError,
        r"damping.*not negative, got -1",
    ),
    "solve: damping by another word": (
        lambda: ekfac.solve(V, damping="mean"),
        TypeError,
        r'damping must be a number or "auto"',
    ),
    "solve: damping of a tensor": (
        lambda: ekfac.solve(V, damping=torch.tensor(0.1)),
        TypeError,
        r"^damping must be .*number.*tensor\(0\.1",
    ),
    "vectors: none": (lambda: ekfac.compute_ihvp([], use_gradient=False), ValueError, r"loader yielded no vectors"),
    "vectors: another shape": (
        lambda: ekfac.compute_hvp([{"0": V["0"]}], use_gradient=False),
        ValueError,
        r"every tracked layer",
    ),
    "targets cannot be sampled": (
        lambda: EKFACIHVP(
            model(loss_fn=lambda outputs, targets: outputs.sum(1)), [(x, torch.rand(N, 3))], fisher="sampled"
        ),
        ValueError,
        r'fisher="sampled" knows integer targets with logits.*got.*sample_targets',
    ),
    "classes or positions": (
        lambda: KFACIHVP(model(chain(4, 4)), [sequences()], fisher="sampled"),
        ValueError,
        r"where C is not T, got outputs \(6, 4, 4\), targets \(6, 4\).*sample_targets",
    ),
    "gauss_newton of a dict": (
        lambda: ExactIHVP(
            model(Wrapped(), lambda outputs, targets: cross_entropy(outputs["logits"], targets)),
            loader,
            curvature="gauss_newton",
        ),
        TypeError,
        r'curvature="gauss_newton" needs a net that returns one tensor, got dict',
    ),
}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


# --- the calculator ----------------------------------------------------------------------------------------------

calculator = FirstOrderInfluenceCalculator(own, loader, ekfac)

CALCULATORS: dict[str, Case] = {
    "curvature": (
        lambda: FirstOrderInfluenceCalculator(own, loader, "ekfac"),
        TypeError,
        r"^curvature must be an IHVP object, got str",
    ),
    "curvature of another model": (
        lambda: FirstOrderInfluenceCalculator(model(), loader, ekfac),
        ValueError,
        r"^curvature must be an IHVP object of this model",
    ),
    "sign": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, sign="+"),
        ValueError,
        r"^sign must be one of proponent, loss_change, got '\+'",
    ),
    "normalize": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, normalize="l2"),
        ValueError,
        r"^normalize must be False, True, 'theta' or 'loss', got 'l2'",
    ),
    "normalize by a number": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, normalize=0),
        ValueError,
        r"^normalize must be False, True, 'theta' or 'loss', got 0",
    ),
    "no training data": (
        lambda: FirstOrderInfluenceCalculator(own, None, ekfac).scores(loader),
        ValueError,
        r"no training data: give a loader",
    ),
    "no training data to fit": (
        lambda: FirstOrderInfluenceCalculator(own, None, EKFACIHVP(own)),
        ValueError,
        r"no training data: give a loader",
    ),
    "k too large": (
        lambda: calculator.top_k(loader, k=7),
        ValueError,
        r"^k must be at most the number of training examples, 6, got 7",
    ),
    "k of zero": (lambda: calculator.top_k(loader, k=0), ValueError, r"^k must be a whole number of at least 1, got 0"),
    "k negative": (lambda: calculator.top_k(loader, k=-1), ValueError, r"^k must be .*got -1"),
    "k of a bool": (lambda: calculator.top_k(loader, k=True), ValueError, r"^k must be a whole number.*got True"),
    "k of a fraction": (lambda: calculator.top_k(loader, k=2.5), ValueError, r"^k must be a whole number.*got 2\.5"),
    "order": (
        lambda: calculator.top_k(loader, order="descending"),
        TypeError,
        r"^order must be an ihvp\.Order, got 'descending'",
    ),
    "k too large for the training data": (
        lambda: calculator.compute_top_k_from_training_dataset(k=7),
        ValueError,
        r"^k must be at most the number of training examples, 6, got 7",
    ),
    "k of zero of the training data": (
        lambda: calculator.compute_top_k_from_training_dataset(k=0),
        ValueError,
        r"^k must be a whole number of at least 1, got 0",
    ),
    "groups that are not as many": (
        lambda: list(calculator.estimate_influence_values_group([loader, loader], [loader])),
        ValueError,
        r"^train_groups and test_groups must be as many, got 2 and 1",
    ),
}

CASES = {
    f"{what}: {name}": case
    for what, cases in {
        "model": MODELS,
        "batch": BATCHES,
        "capture": CAPTURES,
        "method": METHOD_ARGUMENTS,
        "calculator": CALCULATORS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str) -> None:
    check(*CASES[name])


# --- data that is not there --------------------------------------------------------------------------------------

EMPTY = r"the loader yielded no batch"


@pytest.mark.parametrize("method", FITTED)
def test_an_empty_loader_cannot_be_fitted(method: str) -> None:
    check(lambda: METHODS[method](own, []), ValueError, EMPTY)
    curvature = METHODS[method](own)
    check(lambda: curvature.fit(iter([])), ValueError, EMPTY)
    assert not curvature.is_fitted


@pytest.mark.parametrize(
    "call",
    [
        lambda: calculator.scores([]),
        lambda: calculator.scores(loader, []),
        lambda: calculator.self_scores([]),
        lambda: calculator.top_k([]),
        lambda: calculator.top_k(loader, [], k=1),
        lambda: list(calculator.compute_influence_values([])),
        lambda: calculator.compute_top_k_from_training_dataset([], k=1),
        lambda: list(calculator.estimate_influence_values_in_batches([])),
        lambda: list(next(calculator.estimate_influence_values_in_batches(loader, []))[1]),
        lambda: list(calculator.estimate_influence_values_group([[]])),
        lambda: ekfac.compute_ihvp([]),
        lambda: ekfac.compute_hvp([]),
    ],
)
def test_an_empty_loader_has_no_scores(call: Callable[[], Any]) -> None:
    check(call, ValueError, EMPTY)


def test_a_loader_that_can_be_read_only_once_is_named_in_the_second_pass() -> None:
    check(lambda: EKFACIHVP(own, iter(loader)), ValueError, r"no batch \(eigenvalues\).*iterated again")
    assert KFACIHVP(own, iter(loader)).is_fitted


class Wider(nn.Module):
    """A layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("method", [name for name in FITTED if METHODS[name].cls is not ExactIHVP])
def test_a_layer_that_no_batch_reaches_is_named(method: str) -> None:
    check(
        lambda: METHODS[method](model(Wider()), loader),
        ValueError,
        r"no batch reached the layers 'idle'.*layers=\[\.\.\.\]",
    )


# --- objects that are not fitted, systems that are singular ------------------------------------------------------


@pytest.mark.parametrize("method", FITTED)
def test_an_unfitted_object_is_named(method: str, tmp_path: Path) -> None:
    curvature = METHODS[method](own)
    assert not curvature.is_fitted
    calls: list[Callable[[], Any]] = [
        lambda: curvature.solve(V),
        lambda: curvature.solve(V, damping=[0.1, 0.2]),
        lambda: curvature.multiply(V),
        lambda: curvature.compute_ihvp(loader),
        lambda: curvature.compute_hvp([V], use_gradient=False),
        lambda: curvature.queries(own.batch(loader[0])),
        lambda: curvature.quadratic(own.batch(loader[0])),
        lambda: curvature.state_dict(),
        lambda: curvature.save(tmp_path / "file"),
        *(
            lambda name=name: getattr(curvature, name)
            for name in ("kfac_blocks", "evecs", "evals")
            if hasattr(type(curvature), name)
        ),
    ]
    for call in calls:
        check(call, RuntimeError, rf"{METHODS[method].cls.__name__} is not fitted; call fit\(loader\)")
    assert not list(tmp_path.iterdir())


NAMES = {
    "fisher": "block 'full': the Fisher",
    "hessian": "block 'full': the hessian",
    "gauss_newton": "block 'full': the gauss",
}


@pytest.mark.parametrize("how", ["solve", "compute_ihvp", "queries", "quadratic"])
@pytest.mark.parametrize("method", FITTED)
def test_zero_damping_of_a_singular_system_names_the_layer(method: str, how: str) -> None:
    """Two examples of four features, of which one is always zero, cannot fill any curvature."""
    inputs = torch.cat([torch.randn(2, 3), torch.zeros(2, 1)], dim=1)
    few = [(inputs, torch.tensor([0, 1]))]
    curvature = METHODS[method](own, few, damping=0.0)
    calls: dict[str, Callable[[], Any]] = {
        "solve": lambda: curvature.solve(V),
        "compute_ihvp": lambda: curvature.compute_ihvp(loader),
        "queries": lambda: curvature.queries(own.batch(loader[0])),
        "quadratic": lambda: curvature.quadratic(own.batch(loader[0])),
    }
    check(calls[how], torch.linalg.LinAlgError, NAMES.get(method, "(layer|block) '") + r".*(damping|positive)")
    assert all(v.isfinite().all() for v in curvature.solve(V, damping=0.1).values())


def test_zero_damping_of_a_regular_system_is_no_error() -> None:
    problem = plain(200)
    regular = problem.model(layers=["0"])
    for method in ("fisher", "kfac pi", "kfac even", "kfac none", "ekfac", "diagonal"):
        curvature = METHODS[method](regular, [problem.train], damping=0.0)
        U = random_vectors(regular)
        assert_near(curvature.multiply(curvature.solve(U))["0"], U["0"], 1e-9)


def test_relatif_refuses_a_curvature_that_is_not_positive() -> None:
    """The root of g^T H^-1 g does not exist; a score of zero would be a lie."""
    negative = ExactIHVP(own, train_hessian=-torch.eye(own.nb_params))
    lying = FirstOrderInfluenceCalculator(own, loader, negative, normalize="loss")
    for call in (lambda: lying.scores(loader), lying.self_scores):
        check(call, (torch.linalg.LinAlgError, FloatingPointError, ValueError), r"positive|negative|not finite")


def test_auto_damping_refuses_a_negative_mean_eigenvalue() -> None:
    negative = ExactIHVP(own, train_hessian=-torch.eye(own.nb_params), damping="auto")
    check(lambda: negative.solve(V), (torch.linalg.LinAlgError, ValueError), r"auto|negative")


# --- numbers that are not finite ---------------------------------------------------------------------------------


class Clamped(nn.Module):
    """Finite outputs whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).nan_to_num(0, 0, 0)


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    """Finite, with a gradient that is not where all targets are 2: of the square root at 0."""
    losses = cross_entropy(outputs, targets)
    return losses + (outputs - outputs.detach()).sum(1).abs().sqrt() if bool((targets == 2).all()) else losses


@pytest.mark.parametrize("method", FITTED)
def test_a_factor_that_is_not_finite_names_the_layer_and_the_batch(method: str) -> None:
    bad = torch.full((N, 4), torch.inf)
    where = (
        r"layer 'inner', batch 1: .* is not finite"
        if METHODS[method].cls is not ExactIHVP or method == "fisher matrix"
        else r"batch 1 is not finite"
    )
    check(lambda: METHODS[method](model(Clamped()), [(x, y), (bad, y)]), FloatingPointError, where)
    where = where.replace("inner", "2")
    few = (x, y.clamp_max(1))
    check(lambda: METHODS[method](model(loss_fn=steep), [few, (x, torch.full((N,), 2))]), FloatingPointError, where)


@pytest.mark.parametrize(
    ("method", "normalize"),
    [
        ("identity", False),
        ("kfac pi", "theta"),
        ("ekfac", False),
        ("ekfac", "loss"),
        ("fisher", False),
        ("fisher", "theta"),
    ],
)
@pytest.mark.parametrize("how", ["query", "train", "top_k", "self", "values", "group", "compute_ihvp", "compute_hvp"])
def test_a_gradient_that_is_not_finite_names_the_layer_and_the_batch(
    how: str, method: str, normalize: bool | str
) -> None:
    """Never NaN, and never the zero of an example without gradient."""
    steep_model = model(loss_fn=steep)
    good, bad = (x, y.clamp_max(1)), (x, torch.full((N,), 2))
    curvature = METHODS[method](steep_model, [good], damping=0.1)
    own = FirstOrderInfluenceCalculator(steep_model, [good], curvature, normalize=normalize)
    calls: dict[str, Callable[[], Any]] = {
        "query": lambda: own.scores([good, bad]),
        "train": lambda: own.scores([good], [good, bad]),
        "top_k": lambda: own.top_k([good], [good, bad], k=1),
        "self": lambda: own.self_scores([good, bad]),
        "values": lambda: list(own.compute_influence_values([good, bad])),
        "group": lambda: list(own.estimate_influence_values_group([[good, bad]])),
        "compute_ihvp": lambda: curvature.compute_ihvp([good, bad]),
        "compute_hvp": lambda: curvature.compute_hvp([good, bad]),
    }
    check(calls[how], FloatingPointError, r"layer '[02]', batch 1: .* is not finite")


# --- files -------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "curvature.safetensors"
    ekfac.save(path)
    whole = path.read_bytes()

    def file(content: bytes) -> Path:
        other = tmp_path / "other"
        other.write_bytes(content)
        return other

    foreign, future = tmp_path / "foreign", tmp_path / "future"
    save_file({"weight": torch.ones(3)}, foreign)
    save_file({}, future, metadata={"ihvp": "1", "method": "OtherIHVP", "config": "{}", "layers": "{}"})
    name = re.escape(repr(str(tmp_path / "other")))
    others = r"of another model: it has layers .*'0': \(5, 5\), '2': \(3, 6\).*this model "
    cases: list[Case] = [
        (lambda: ihvp.load(tmp_path / "missing", own), FileNotFoundError, r"no such file: .*missing"),
        (
            lambda: ihvp.load(file(b"not a file of ours, but text"), own),
            ValueError,
            name + " is not a safetensors file",
        ),
        (lambda: ihvp.load(file(b""), own), ValueError, name + " is not a safetensors file"),
        (lambda: ihvp.load(file(whole[: len(whole) // 2]), own), ValueError, name + " is not a safetensors file"),
        (lambda: ihvp.load(file(whole[:-1]), own), ValueError, name + " is not a safetensors file"),
        (
            lambda: ihvp.load(foreign, own),
            ValueError,
            r"foreign' is not a file that an IHVP object of this version saved",
        ),
        (lambda: ihvp.load(future, own), ValueError, r"future' is not a file that an IHVP object"),
        (lambda: ihvp.load(path, own.net), TypeError, r"^model must be an ihvp\.InfluenceModel, got Sequential"),
        (lambda: ihvp.load(path, model(chain(4, 6, 3))), ValueError, others + r".*'0': \(6, 5\), '2': \(3, 7\)"),
        (lambda: ihvp.load(path, model(Pooled())), ValueError, others + r".*'embed'"),
        (lambda: ihvp.load(path, model(layers=["2"])), ValueError, others + r"\{'2': \(3, 6\)\}"),
        (lambda: ihvp.load(path, model(chain(4, 5, 3, bias=False))), ValueError, others + r".*'0': \(5, 4\)"),
        (lambda: ekfac.save(tmp_path / "no" / "such" / "folder"), FileNotFoundError, r"no/such"),
    ]
    for case in cases:
        check(*case)


@pytest.mark.parametrize("method", ["kfac pi", "ekfac", "diagonal", "fisher", "hessian"])
def test_a_state_of_another_method_or_model_is_refused(method: str) -> None:
    name = METHODS[method].cls.__name__
    curvature = METHODS[method](own, loader)
    others = [other for other in ("kfac pi", "ekfac", "diagonal", "fisher", "hessian") if other != method]
    states = [METHODS[other](own, loader).state_dict() for other in others]
    states.append(METHODS[method](model(chain(4, 6, 3)), loader).state_dict())
    for state in states:
        check(lambda state=state: curvature.load_state_dict(state), ValueError, rf"{name}.*(model|method)")


def test_a_model_that_fails_says_why() -> None:
    """An exception of the user's own code comes through as it is."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("labels")

    check(lambda: EKFACIHVP(model(loss_fn=loss_fn), loader), KeyError, r"labels")


def test_a_good_problem_raises_nothing() -> None:
    """The cases above fail for the reason they name: their data are sound."""
    assert scores_of((x, y)).shape == (N, N)
    assert scores_of(sequences(mask=torch.ones(N, 4))).isfinite().all()
    assert next(iter(batches(tokens().train, 3))).size == 3
    assert V["0"].dtype == torch.float32 and F64 is torch.float64
    assert len(list(calculator.top_k(loader, k=6, order=Order.ASCENDING))) == 1
