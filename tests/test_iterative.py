"""Iterative, low-rank and rank-one methods against dense float64 solves of a small trained net."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ihvp
import ihvp.methods.products
import pytest
import torch
from ihvp import (
    EKFACIHVP,
    ArnoldiIHVP,
    Batch,
    CgIHVP,
    ConvergenceError,
    ConvergenceWarning,
    DataInfIHVP,
    ExactIHVP,
    IdentityIHVP,
    InfluenceModel,
    InverseHarmonicMeanIHVP,
    JacobiPreconditioner,
    LissaIHVP,
    NystroemIHVP,
    NystroemPreconditioner,
)
from ihvp.methods.blocks import make_blocks, take
from ihvp.methods.nystroem import nystroem_sketch
from ihvp.methods.products import CurvatureProducts
from nets import (
    F32,
    F64,
    PROBLEMS,
    Problem,
    Vectors,
    assert_near,
    batches,
    chain,
    cross_entropy,
    fisher,
    flat,
    gauss_newton,
    gradients,
    hessian,
    plain,
    pooled,
    random_vectors,
    rows,
    tokens,
    within_blocks,
)
from torch import Tensor, nn

DAMPING = 0.3
CURVATURES: dict[str, Callable[[InfluenceModel, Batch], Tensor]] = {
    "hessian": hessian,
    "gauss_newton": gauss_newton,
    "fisher": fisher,
}
STRUCTURES: dict[str, Any] = {
    "full": "full",
    "layer": "layer",
    "parameter": "parameter",
    "custom": {"late": ["2.bias", "4"], "early": ["0", "2.weight"]},
}


@pytest.fixture(scope="module")
def trained() -> tuple[Problem, InfluenceModel]:
    """A net of three layers, trained until its loss has a minimum nearby: its damped Hessian is positive definite."""
    torch.manual_seed(0)
    net = chain(4, 5, 4, 3).double()
    x = torch.randn(40, 4, dtype=F64)
    y = (x[:, :3] + 0.5 * torch.randn(40, 3, dtype=F64)).argmax(1)
    weights = torch.rand(40, dtype=F64) + 0.5
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in net.parameters())
        value = (weights * cross_entropy(net(x), y)).mean() + 5e-3 * decay
        value.backward()
        return value

    optimizer.step(loss)
    net.requires_grad_(False)
    train = Batch(args=(x,), targets=y, weights=weights)
    problem = Problem(net, cross_entropy, train, (rows(train, slice(0, 5)),))
    return problem, problem.model()


def dense(matrix: Tensor, v: Tensor, damping: float = DAMPING) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), v.T).T


Trained = tuple[Problem, InfluenceModel]

SOLVERS: dict[str, tuple[Callable[..., Any], float]] = {  # and what they owe the dense solution
    "exact": (ExactIHVP, 1e-6),
    "cg": (lambda *args, **options: CgIHVP(*args, rtol=1e-7, atol=0, **options), 1e-4),
    "block cg": (lambda *args, **options: CgIHVP(*args, rtol=1e-7, atol=0, krylov="shared", **options), 1e-4),
    "lissa": (lambda *args, **options: LissaIHVP(*args, rtol=1e-5, scale=2.5, **options), 1e-3),
    "arnoldi": (lambda *args, **options: ArnoldiIHVP(*args, rank=1000, **options), 1e-4),
    "nystroem": (lambda *args, **options: NystroemIHVP(*args, rank=1000, **options), 1e-4),
}


def solver(name: str, curvature: str, structure: str = "full") -> Callable[..., Any]:
    make, _ = SOLVERS[name]
    return lambda *args: make(*args, curvature=curvature, block_structure=STRUCTURES[structure])


# --- products ----------------------------------------------------------------------------------------------------


@functools.cache
def dense_problem(problem: str, curvature: str) -> tuple[Problem, InfluenceModel, Tensor]:
    """A problem and its dense matrix, which takes longer than all that is asked of it."""
    data = PROBLEMS[problem]()
    model = data.model()
    return data, model, CURVATURES[curvature](model, data.train)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_are_those_of_the_dense_matrix(
    curvature: str, problem: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether linearised batches are kept or made again in every pass."""
    if not kept:
        monkeypatch.setattr(ihvp.methods.products, "KEPT_BYTES", 0)
    data, model, whole = dense_problem(problem, curvature)
    for structure in ("full", "parameter"):
        blocks = make_blocks(model, structure)
        loader = Counting(batches(data.train, 8))
        products = CurvatureProducts(model, loader, curvature, blocks)
        F = within_blocks(structure, lambda *args: whole)(model, data.train)
        V = random_vectors(model, 70)
        want = vectors(model, flat(V) @ F)
        for block, own in blocks.items():
            assert_near(products(block, take(V, own)), take(want, own))
        assert loader.passes == (1 if kept else 1 + len(blocks))


class Counting:
    """A loader that counts its passes."""

    def __init__(self, data: list[Batch]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return iter(self.data)


def vectors(model: InfluenceModel, x: Tensor) -> Vectors:
    """(Q,p) as layer name -> (Q,O,I')."""
    sizes = [O * I for O, I in (layer.shape for layer in model.layers.values())]
    parts = zip(model.layers.items(), x.split(sizes, dim=1), strict=True)
    return {name: part.reshape(-1, *layer.shape) for (name, layer), part in parts}


class Normalised(nn.Module):
    """A net with buffers, one of them written in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.norm(self.first(x)).tanh())


def test_products_leave_the_net_alone_and_outlive_what_happens_to_it() -> None:
    """Parameters and buffers are those of the fit, though the net is used and trained between the products."""
    torch.manual_seed(0)
    net = Normalised().double().eval()
    model = InfluenceModel(net, cross_entropy, progress=False)
    data = [(torch.randn(9, 4, dtype=F64), torch.randint(3, (9,)))]
    before = {name: x.clone() for name, x in net.state_dict().items()}
    products = CurvatureProducts(model, data, "hessian", make_blocks(model, "full"))
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    v = torch.randn(3, model.nb_params, dtype=F64)
    first = products("full", v)
    with torch.no_grad():
        net.calls.add_(1)
        for p in net.parameters():
            p.add_(1.0)
    assert torch.equal(products("full", v), first)
    refitted = CurvatureProducts(model, data, "hessian", make_blocks(model, "full"))
    assert float((refitted("full", v) - first).norm()) > 1e-3


def test_mean_eigenvalue_is_exact_for_few_parameters_and_near_for_many() -> None:
    data = plain()
    model = data.model()
    products = CurvatureProducts(model, [data.train], "fisher", make_blocks(model, "full"))
    want = float(fisher(model, data.train).diagonal().mean())
    assert products.mean_eigenvalue("full") == pytest.approx(want, rel=1e-10)
    net = chain(6, 8, 5).double()
    large = InfluenceModel(net, cross_entropy, progress=False)
    batch = Batch(args=(torch.randn(50, 6, dtype=F64),), targets=torch.randint(5, (50,)))
    estimate = CurvatureProducts(large, [batch], "fisher", make_blocks(large, "full")).mean_eigenvalue("full")
    assert estimate == pytest.approx(float(fisher(large, batch).diagonal().mean()), rel=0.3)


# --- solutions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curvature", "structure"),
    [
        *((curvature, "full") for curvature in CURVATURES),
        *(("hessian", own) for own in ("layer", "parameter", "custom")),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_solutions_of_a_trained_net(name: str, curvature: str, structure: str, trained: Trained) -> None:
    data, model = trained
    _, tolerance = SOLVERS[name]
    F = within_blocks(STRUCTURES[structure], CURVATURES[curvature])(model, data.train)
    own = solver(name, curvature, structure)(model, batches(data.train, 20), DAMPING)
    V = random_vectors(model)
    assert_near(flat(own.multiply(V)), flat(V) @ F, 1e-6)
    assert_near(flat(own.solve(V)), dense(F, flat(V)), tolerance)


@pytest.mark.parametrize("problem", ["tokens", "pooled"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "fisher"])
@pytest.mark.parametrize("name", SOLVERS)
def test_solutions_with_masks_and_weights(name: str, curvature: str, problem: str) -> None:
    data, model, F = dense_problem(problem, curvature)
    _, tolerance = SOLVERS[name]
    own = solver(name, curvature)(model, batches(data.train, 8), 0.3)
    V = random_vectors(model)
    assert_near(flat(own.solve(V)), dense(F, flat(V), 0.3), tolerance)


@pytest.mark.parametrize("name", SOLVERS)
def test_several_dampings_are_one_by_one(name: str, trained: Trained) -> None:
    data, model = trained
    own = solver(name, "gauss_newton", "layer")(model, [data.train], DAMPING)
    F = within_blocks("layer", gauss_newton)(model, data.train)
    dampings: list[Any] = [0.6, 0.3, 0.2 if name == "lissa" else "auto", {"0": 0.4, "2": 0.7, "4": 0.2}]
    V = random_vectors(model)
    together = own.solve(V, dampings)
    for i, damping in enumerate(dampings):
        for layer, x in own.solve(V, damping).items():
            assert together[layer].shape == (4, *x.shape)
            assert_near(together[layer][i], x, SOLVERS[name][1])
    for i in (0, 1):
        got = flat({layer: x[i] for layer, x in together.items()})
        assert_near(got, dense(F, flat(V), dampings[i]), SOLVERS[name][1])


@pytest.mark.parametrize("name", SOLVERS)
def test_with_damping_shares_the_fit(name: str, trained: Trained) -> None:
    data, model = trained
    loader = Counting([data.train])
    own = solver(name, "gauss_newton")(model, loader, 0.5)
    other = own.with_damping(DAMPING)
    V = random_vectors(model)
    assert loader.passes == 1
    assert_near(flat(other.solve(V)), dense(gauss_newton(model, data.train), flat(V)), SOLVERS[name][1])
    assert own.damping == 0.5 and loader.passes == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_float32(name: str) -> None:
    """float64 vectors and float32 products: the float64 answer to the method's tolerance, at least 1e-4."""
    data = plain()
    model = data.model()
    want = dense(gauss_newton(model, data.train), flat(random_vectors(model)), 0.3)
    data.net.float()
    train = replace(data.train, args=(data.train.args[0].float(),))
    got = solver(name, "gauss_newton")(model, batches(train, 8), 0.3).solve(random_vectors(model))
    assert all(x.dtype == F32 for x in got.values())
    assert_near(flat(got), want, max(1e-4, SOLVERS[name][1]))


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SOLVERS)
def test_caller_may_have_switched_gradients_off(name: str, caller: Callable[[], Any], trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    want = solver(name, "gauss_newton")(model, [data.train], DAMPING).solve(V)
    with caller():
        own = solver(name, "gauss_newton")(model, [data.train], DAMPING)
        got = own.solve({layer: v.clone() for layer, v in V.items()})
        own.quadratic(data.tests[0])
    assert_near(flat(got), flat(want))


@pytest.mark.parametrize("name", SOLVERS)
def test_queries_and_quadratic_forms(name: str, trained: Trained) -> None:
    data, model = trained
    own = solver(name, "gauss_newton")(model, [data.train], DAMPING)
    F = gauss_newton(model, data.train)
    g = flat(gradients(model, data.tests[0]))
    calculator = ihvp.FirstOrderInfluenceCalculator(model, [data.train], own)
    want = dense(F, g) @ flat(gradients(model, data.train)).T
    assert_near(calculator.scores(data.tests), want, SOLVERS[name][1])
    P = dense(F, g)
    assert_near(own.quadratic(data.tests[0]), (P * g).sum(1), SOLVERS[name][1])
    assert_near(own.quadratic(data.tests[0], 2), (P * P).sum(1), SOLVERS[name][1])


# --- direct solves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_direct_solve_needs_no_eigenvalues(curvature: str, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the Hessian is indefinite; sixteen dampings share one diagonalisation."""
    data, model = trained
    own = ExactIHVP(model, [data.train], DAMPING, curvature)
    V, F = random_vectors(model), CURVATURES[curvature](model, data.train)
    values = torch.linalg.eigvalsh(F)
    between = -float((values[0] + values[1]) / 2) if curvature == "hessian" else DAMPING
    calls: list[str] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda *args: pytest.fail("eigenvalues were computed"))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: (calls.append("eigh"), eigh(*args))[1])
    for damping in (DAMPING, 0.01, max(between, 1e-3)):
        assert_near(flat(own.solve(V, damping)), dense(F, flat(V), damping), 1e-6)
    assert not calls
    dampings = [0.1 * (i + 1) for i in range(16)]
    together = own.solve(V, dampings)
    assert calls == ["eigh"]
    for i, damping in enumerate(dampings):
        assert_near(flat({name: x[i] for name, x in together.items()}), dense(F, flat(V), damping), 1e-6)


def test_the_smallest_eigenvalue_of_a_singular_block_is_named_to_a_small_factor() -> None:
    data = plain()
    model = data.model()
    Q = torch.linalg.qr(torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    for smallest in (1e-17, -1e-17, 3e-17):
        values = torch.linspace(1, 2, 24, dtype=F64)
        values[3], values[7] = smallest, -0.5
        own = ExactIHVP(model, train_hessian=Q * values @ Q.T)
        with pytest.raises(
            torch.linalg.LinAlgError, match=r"block 'full': .* its smallest eigenvalue is [\d.]+e-1[5-9] "
        ):
            own.solve(random_vectors(model))
    values[3] = 1e-9
    own = ExactIHVP(model, train_hessian=Q * values @ Q.T)
    V = random_vectors(model)
    assert_near(flat(own.multiply(own.solve(V))), flat(V), 1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [1.0, 1e-60, 1e60])
@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-6])
def test_a_float32_factor_is_refined_and_an_ill_conditioned_matrix_takes_float64(
    smallest: float, scale: float, sign: int
) -> None:
    """Definite and indefinite, also where float32 has no such numbers; at most 1e-12 / 1e-4, the stated error."""
    model = plain().model()
    Q = torch.linalg.qr(torch.randn(24, 24, dtype=F64, generator=torch.Generator().manual_seed(0))).Q
    values = scale * torch.logspace(0, float(torch.tensor(smallest).log10()), 24, dtype=F64)
    values[5] *= sign
    own = ExactIHVP(model, train_hessian=Q * values @ Q.T)
    V = random_vectors(model)
    got = own._solve_block("full", 1e-30 * flat(V), [0.0])[0]  # before it is rounded to the model's dtype
    assert_near(got, 1e-30 * flat(V) @ (Q / values) @ Q.T, 1e-8)
    (factor,) = own._factors.values()
    assert factor.LU.dtype == (F32 if smallest > 1e-4 else F64)
    assert (factor.pivots is None) == (sign == 1)


# --- conjugate gradients -----------------------------------------------------------------------------------------

PRECONDITIONERS: dict[str, Callable[[InfluenceModel, list[Batch]], Any]] = {
    "none": lambda model, data: None,
    "jacobi": lambda model, data: JacobiPreconditioner(),
    "jacobi exact": lambda model, data: JacobiPreconditioner(samples=1000),
    "nystroem": lambda model, data: NystroemPreconditioner(rank=15),
    "ekfac": lambda model, data: EKFACIHVP(model, data, DAMPING),
}


@pytest.mark.parametrize("krylov", ["separate", "shared"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_preconditioned_conjugate_gradients(preconditioner: str, krylov: str, trained: Trained) -> None:
    data, model = trained
    loader = batches(data.train, 20)
    for structure in ("full", "layer"):
        own = CgIHVP(
            model,
            loader,
            DAMPING,
            rtol=1e-7,
            atol=0,
            krylov=krylov,
            preconditioner=PRECONDITIONERS[preconditioner](model, loader),
            on_failure="raise",
            block_structure=structure,
        )
        F = within_blocks(structure, hessian)(model, data.train)
        V = random_vectors(model)
        assert_near(flat(own.solve(V)), dense(F, flat(V)), 1e-4)
        for i, damping in enumerate((0.2, 1.0)):
            got = flat({layer: x[i] for layer, x in own.solve(V, [0.2, 1.0]).items()})
            assert_near(got, dense(F, flat(V), damping), 1e-4)


def test_a_good_preconditioner_and_a_shared_krylov_space_take_fewer_iterations(trained: Trained) -> None:
    """The inverse itself takes one; as many right-hand sides as parameters take one, too."""
    data, model = trained
    V = random_vectors(model)

    def iterations(U: Vectors, **options: Any) -> int:
        own = CgIHVP(model, [data.train], DAMPING, "gauss_newton", rtol=1e-8, atol=0, on_failure="raise", **options)
        own.solve(U)
        return own.reports["full"].iterations

    plainly = iterations(V)
    assert iterations(V, preconditioner=ExactIHVP(model, [data.train], DAMPING, "gauss_newton")) <= 2
    assert iterations(V, preconditioner=NystroemPreconditioner(rank=1000)) <= 2
    assert iterations(V, preconditioner=NystroemPreconditioner(rank=30)) < plainly
    assert iterations(V, krylov="shared") < plainly
    assert iterations(random_vectors(model, model.nb_params), krylov="shared") == 1


@pytest.mark.parametrize("krylov", ["separate", "shared"])
def test_zero_equal_and_no_right_hand_sides(krylov: str, trained: Trained) -> None:
    data, model = trained
    own = CgIHVP(model, [data.train], DAMPING, rtol=1e-7, atol=0, krylov=krylov, on_failure="raise")
    F = hessian(model, data.train)
    V = random_vectors(model, 3)
    W = {name: torch.cat([v, 0 * v[:1], v, 1e-9 * v[:2]]) for name, v in V.items()}
    assert_near(flat(own.solve(W)), dense(F, flat(W)), 1e-4)
    assert_near(flat(own.solve(W))[-2:], dense(F, flat(W)[-2:]), 1e-4)
    assert not own.solve(W)["0"][3].any()
    report = own.reports["full"]
    assert report.residuals.shape == report.converged.shape == (1, 9)
    assert bool(report.converged.all()) and float(report.residuals.max()) <= 1e-7
    assert flat(own.solve({name: v[:0] for name, v in V.items()})).shape == (0, model.nb_params)
    assert own.solve(W, [0.1, 0.2])["0"].shape[:2] == (2, 9)
    assert own.solve(W, [])["0"].shape[:2] == (0, 9)


@pytest.mark.parametrize("distance", [1e-3, 1e-7, 1e-12])
def test_right_hand_sides_that_nearly_depend_on_each_other(distance: float, trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    V = {name: v[:1] + distance * v for name, v in V.items()}
    own = CgIHVP(model, [data.train], DAMPING, rtol=1e-8, krylov="shared")
    F = CURVATURES["hessian"](model, data.train)
    assert_near(flat(own.solve(V)), dense(F, flat(V)), SOLVERS["block cg"][1])


def test_residuals_are_those_of_the_solutions(trained: Trained) -> None:
    data, model = trained
    H, V = hessian(model, data.train), random_vectors(model)
    for krylov, maxiter in (("separate", 7), ("shared", 3)):
        own = CgIHVP(model, [data.train], DAMPING, krylov=krylov, maxiter=maxiter, on_failure="return")
        dampings = [0.3, 0.05]
        x = own.solve(V, dampings)
        report = own.reports["full"]
        for i, damping in enumerate(dampings):
            P = flat({layer: y[i] for layer, y in x.items()})
            residual = flat(V) - P @ (H + damping * torch.eye(len(H), dtype=F64))
            assert_near(report.residuals[i], residual.norm(dim=1) / flat(V).norm(dim=1), 1e-8)


@pytest.mark.parametrize("krylov", ["separate", "shared"])
def test_conjugate_gradients_that_do_not_converge_name_the_residual(krylov: str, trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    options: dict[str, Any] = {"maxiter": 2, "krylov": krylov}
    match = r"block 'full': CgIHVP stopped after 2 iterations with 4 of 4 systems above rtol=0\.0001, atol=1e-06: the "
    match += r"largest relative residual is [\d.e-]+; a larger damping"
    with pytest.raises(ConvergenceError, match=match):
        CgIHVP(model, [data.train], DAMPING, on_failure="raise", **options).solve(V)
    with pytest.warns(ConvergenceWarning, match=match):
        warned = CgIHVP(model, [data.train], DAMPING, **options).solve(V)
    own = CgIHVP(model, [data.train], DAMPING, on_failure="return", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_near(flat(own.solve(V)), flat(warned))
    assert own.reports["full"].iterations == 2 and not bool(own.reports["full"].converged.any())


@pytest.mark.parametrize("krylov", ["separate", "shared"])
def test_negative_curvature_ends_the_iterations_and_is_named(krylov: str) -> None:
    """An untrained net: its Hessian has negative eigenvalues."""
    data = plain()
    model = data.model()
    H, V = hessian(model, data.train), random_vectors(model)
    smallest = float(torch.linalg.eigvalsh(H)[0])
    assert smallest < -1e-3
    match = (
        r"relative residual is .*, and the damped curvature is not positive definite: .* = -[\d.e-]+ was met; a larger"
    )
    with pytest.raises(ConvergenceError, match=match):
        CgIHVP(model, [data.train], krylov=krylov, on_failure="raise").solve(V)
    own = CgIHVP(model, [data.train], krylov=krylov, on_failure="return")
    x = own.solve(V)
    report = own.reports["full"]
    assert report.iterations <= model.nb_params and not bool(report.converged.all())
    assert_near(report.residuals[0], (flat(V) - flat(x) @ H).norm(dim=1) / flat(V).norm(dim=1), 1e-8)


@pytest.mark.parametrize("krylov", ["separate", "shared"])
def test_negative_curvature_at_one_damping_leaves_a_larger_one_alone(krylov: str) -> None:
    data = plain()
    model = data.model()
    V = random_vectors(model)
    own = CgIHVP(model, [data.train], rtol=1e-7, atol=0, krylov=krylov, on_failure="return")
    x = own.solve(V, [0.0, 2.0])
    assert not bool(own.reports["full"].converged[0].all()) and bool(own.reports["full"].converged[1].all())
    want = dense(hessian(model, data.train), flat(V), 2.0)
    assert_near(flat({layer: y[1] for layer, y in x.items()}), want, 1e-4)


# --- LiSSA -------------------------------------------------------------------------------------------------------


def test_lissa_with_dampening_solves_the_system_it_says(trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    own = LissaIHVP(model, [data.train], DAMPING, "gauss_newton", dampen=0.1, scale=3.0, rtol=1e-8, on_failure="raise")
    assert_near(flat(own.solve(V)), dense(gauss_newton(model, data.train), flat(V), DAMPING + 0.1 * 3.0), 1e-6)
    assert float(own.reports["full"].residuals.max()) <= 1e-8


def test_lissa_that_diverges_names_the_residual(trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    match = r"block 'full': LiSSA diverges: after \d+ iterations the relative residual is .*2 scale = 0\.02: a larger"
    for on_failure in ("warn", "raise"):
        with pytest.raises(ConvergenceError, match=match):
            LissaIHVP(model, [data.train], DAMPING, scale=0.01, on_failure=on_failure).solve(V)
    own = LissaIHVP(model, [data.train], DAMPING, scale=0.01, on_failure="return")
    own.solve(V)
    assert not bool(own.reports["full"].converged.any())


def test_lissa_that_stops_early_names_the_residual(trained: Trained) -> None:
    data, model = trained
    V = random_vectors(model)
    with pytest.warns(ConvergenceWarning, match=r"LissaIHVP stopped after 3 .* with 4 of 4 .* residual is 0\.\d+"):
        LissaIHVP(model, [data.train], DAMPING, maxiter=3).solve(V)
    zero = {name: 0 * v for name, v in V.items()}
    assert not flat(LissaIHVP(model, [data.train], DAMPING, on_failure="raise").solve(zero)).any()


# --- low rank ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("complement", ["dropped", "damped"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_arnoldi_takes_the_largest_eigenpairs(curvature: str, complement: str, trained: Trained) -> None:
    data, model = trained
    F = CURVATURES[curvature](model, data.train)
    values, U = torch.linalg.eigh(F)
    top = values.abs().argsort(descending=True)[:10]
    own = ArnoldiIHVP(model, [data.train], DAMPING, curvature=curvature, complement=complement)
    assert_near(own.evals["full"].sort().values, values[top].sort().values, 1e-6)
    V = random_vectors(model)
    inside = flat(V) @ U[:, top]
    assert_near(flat(own.multiply(V)), inside * values[top] @ U[:, top].T, 1e-6)
    want = inside / (values[top] + DAMPING) @ U[:, top].T
    if complement == "damped":
        want = want + (flat(V) - inside @ U[:, top].T) / DAMPING
    assert_near(flat(own.solve(V)), want, 1e-5)


def test_arnoldi_that_does_not_converge_says_how_many_did(trained: Trained) -> None:
    data, model = trained
    options: dict[str, Any] = {"rank": 8, "krylov_dimension": 9, "tol": 1e-14, "maxiter": 3}
    match = r"block 'full': \d of 8 eigenpairs reached tol=1e-14"
    with pytest.raises(ConvergenceError, match=match):
        ArnoldiIHVP(model, [data.train], DAMPING, on_failure="raise", **options)
    fresh = ArnoldiIHVP(model, None, DAMPING, on_failure="raise", **options)
    with pytest.raises(ConvergenceError, match=match):
        fresh.fit([data.train])
    assert not fresh.is_fitted


@pytest.mark.parametrize("curvature", CURVATURES)
def test_nystroem_is_its_formula(curvature: str, trained: Trained) -> None:
    """The sketch is F Omega (Omega^T F Omega)^+ (F Omega)^T: of the given rank, and F on the range of Omega."""
    data, model = trained
    own = NystroemIHVP(model, [data.train], DAMPING, 12, curvature, seed=3)
    p = model.nb_params
    Omega = torch.linalg.qr(torch.randn(p, 12, dtype=F64, generator=torch.Generator().manual_seed(3))).Q
    F = CURVATURES[curvature](model, data.train)
    sketch = F @ Omega @ torch.linalg.pinv(Omega.T @ F @ Omega, hermitian=True) @ (F @ Omega).T
    V = random_vectors(model)
    assert_near(flat(own.multiply(V)), flat(V) @ sketch, 1e-8)
    assert_near(flat(own.solve(V)), dense(sketch, flat(V)), 1e-6)
    assert len(own.evals["full"]) == 12


@pytest.mark.parametrize("rank", [10, 40])
def test_a_sketch_with_the_rank_of_the_matrix_is_the_matrix(rank: int, trained: Trained) -> None:
    """Of 60 columns: a tall sketch takes its random matrix as drawn, a wide one makes it orthonormal."""
    generator = torch.Generator().manual_seed(1)
    L = torch.randn(60, rank, dtype=F64, generator=generator)
    F = L * torch.where(torch.arange(rank) % 3 == 0, -1.0, 1.0) @ L.T
    U, values = nystroem_sketch(lambda v: v @ F, 60, rank, 0, trained[1])
    assert U.shape == (60, rank)
    assert_near(U.T @ U, torch.eye(rank, dtype=F64), 1e-12)
    assert_near(U * values @ U.T, F, 1e-8)  # loses the condition of Omega^T F Omega, about 1e4


@pytest.mark.parametrize("make", [ArnoldiIHVP, NystroemIHVP])
def test_auto_damping_of_low_rank_methods_is_of_the_eigenvalues_they_have(make: Any, trained: Trained) -> None:
    data, model = trained
    own = make(model, [data.train], "auto", curvature="fisher")
    V = random_vectors(model)
    value = 0.1 * float(own.evals["full"].sum()) / model.nb_params
    assert_near(flat(own.solve(V)), flat(own.solve(V, value)))


# --- rank one ----------------------------------------------------------------------------------------------------


def harmonic(g: Tensor, damping: float) -> Tensor:
    """mean_n (g_n g_n^T + damping I)^-1, as a matrix."""
    eye = torch.eye(g.shape[1], dtype=F64)
    return torch.stack([torch.linalg.inv(torch.outer(row, row) + damping * eye) for row in g]).mean(0)


@pytest.mark.parametrize("structure", ["full", "layer", "parameter"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_harmonic_mean_is_its_formula(problem: str, structure: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    own = InverseHarmonicMeanIHVP(model, batches(data.train, 8), 0.3, block_structure=structure)
    g, V = gradients(model, data.train), random_vectors(model)
    got, several = own.solve(V), own.solve(V, [0.3, 2.0])
    for columns in own.blocks.values():
        for damping, x in ((0.3, got), *((d, {k: v[i] for k, v in several.items()}) for i, d in enumerate((0.3, 2.0)))):
            assert_near(take(x, columns), take(V, columns) @ harmonic(take(g, columns), damping))
    F = within_blocks(structure, fisher)(model, data.train)
    assert_near(flat(own.multiply(V)), flat(V) @ F)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_datainf_is_its_formula(problem: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    own = DataInfIHVP(model, batches(data.train, 8))
    V = random_vectors(model)
    got = own.solve(V)
    for name, g in gradients(model, data.train).items():
        rows_g, v = g.flatten(1), V[name].flatten(1)
        damping = 0.1 * float(rows_g.square().sum(1).mean()) / rows_g.shape[1]
        inner = (v @ rows_g.T) / (damping + rows_g.square().sum(1))
        want = (v - inner @ rows_g / len(g)) / damping
        assert_near(got[name].flatten(1), want)
    assert set(own.blocks) == set(model.layers)


def test_rank_one_methods_are_exact_for_one_example() -> None:
    data = plain(N=1)
    model = data.model()
    V = random_vectors(model)
    own = InverseHarmonicMeanIHVP(model, [data.train], 0.3)
    assert_near(flat(own.solve(V)), dense(fisher(model, data.train), flat(V), 0.3))


# --- state -------------------------------------------------------------------------------------------------------

SAVED: dict[str, Callable[..., Any]] = {
    "arnoldi": lambda *args: ArnoldiIHVP(*args, rank=6, complement="damped", block_structure="layer"),
    "nystroem": lambda *args: NystroemIHVP(
        *args, rank=7, curvature="fisher", seed=4, block_structure=STRUCTURES["custom"]
    ),
    "harmonic mean": lambda *args: InverseHarmonicMeanIHVP(*args, block_structure="parameter"),
    "datainf": lambda *args: DataInfIHVP(*args),
    "exact": lambda *args: ExactIHVP(*args, curvature="fisher", block_structure=STRUCTURES["custom"]),
}


@pytest.mark.parametrize("method", SAVED)
def test_a_saved_object_solves_bitwise_the_same(method: str, tmp_path: Path, trained: Trained) -> None:
    data, model = trained
    own = SAVED[method](model, batches(data.train, 16))
    own = own.with_damping({block: 0.1 * (i + 1) for i, block in enumerate(own.blocks)})
    own.save(tmp_path / "file")
    loaded = ihvp.load(tmp_path / "file", model)
    V = random_vectors(model)
    assert type(loaded) is type(own) and loaded.blocks == own.blocks and loaded.damping == own.damping
    assert loaded._config() == own._config()
    for f in ("solve", "multiply"):
        want = getattr(own, f)(V)
        assert all(torch.equal(x, want[name]) for name, x in getattr(loaded, f)(V).items())


@pytest.mark.parametrize("method", SAVED)
def test_a_wrong_state_is_refused(method: str, trained: Trained) -> None:
    data, model = trained
    own = SAVED[method](model, batches(data.train, 16))
    state = own.state_dict()
    first = next(iter(state))
    for wrong in (
        {},
        dict(list(state.items())[1:]),
        state | {"other": torch.zeros(3)},
        state | {first: torch.zeros(7, 5)},
    ):
        with pytest.raises(ValueError, match=type(own).__name__):
            own.load_state_dict(wrong)


@pytest.mark.parametrize("cls", [CgIHVP, LissaIHVP])
def test_a_method_whose_state_is_the_data_says_that_it_cannot_be_saved(
    cls: Any, tmp_path: Path, trained: Trained
) -> None:
    data, model = trained
    own = cls(model, [data.train], DAMPING)
    with pytest.raises(NotImplementedError, match=rf"{cls.__name__} cannot be saved: its state is the data"):
        own.save(tmp_path / "file")
    assert not os.listdir(tmp_path)
    with pytest.raises(NotImplementedError, match=rf"{cls.__name__} has no state to load"):
        own.load_state_dict({})


@pytest.mark.parametrize("method", [*SOLVERS, "harmonic mean", "datainf"])
def test_a_fit_that_fails_leaves_the_earlier_one(method: str, trained: Trained) -> None:
    data, model = trained
    own = (
        SAVED[method](model, [data.train])
        if method not in SOLVERS
        else solver(method, "fisher")(model, [data.train], DAMPING)
    )
    V = random_vectors(model)
    before = flat(own.solve(V))

    def failing() -> Iterable[Batch]:
        yield data.tests[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        own.fit(failing())
    assert torch.equal(flat(own.solve(V)), before)


# --- the factory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ihvp.METHODS)
def test_every_method_is_made_by_its_name(name: str, trained: Trained) -> None:
    data, model = trained
    own = ihvp.make_ihvp(name, model, [data.train], {"damping": 0.5})
    assert type(own) is ihvp.METHODS[name] and own.is_fitted and own.damping == 0.5
    assert not ihvp.make_ihvp(name, model).is_fitted or name == "identity"
    V = random_vectors(model)
    assert flat(own.solve(V)).isfinite().all() and flat(own.multiply(V)).isfinite().all()


def test_unknown_names_and_options_list_the_known_ones() -> None:
    model = plain().model()
    with pytest.raises(ValueError, match=r"name must be one of exact, cgd, lissa, .*identity, got 'newton'"):
        ihvp.make_ihvp("newton", model)
    with pytest.raises(ValueError, match=r"options of 'cgd' must be among damping, curvature, rtol, .*, got 'rank'"):
        ihvp.make_ihvp("cgd", model, None, {"rank": 3})


# --- bad input ---------------------------------------------------------------------------------------------------

model = plain().model()
other = plain().model()
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "curvature": (lambda: CgIHVP(model, curvature="kfac"), ValueError, r"curvature must be one of hessian, .*'kfac'"),
    "rtol": (lambda: CgIHVP(model, rtol=-1), ValueError, r"rtol must not be negative, got -1"),
    "maxiter": (lambda: CgIHVP(model, maxiter=0), ValueError, r"maxiter must be positive, got 0"),
    "krylov": (lambda: CgIHVP(model, krylov="block"), ValueError, r"krylov must be one of separate, shared, got"),
    "preconditioner": (lambda: CgIHVP(model, preconditioner="jacobi"), TypeError, r"preconditioner must be .* got str"),
    "preconditioner of another model": (
        lambda: CgIHVP(model, preconditioner=IdentityIHVP(other)),
        ValueError,
        r"preconditioner must be an IHVP object of this model",
    ),
    "preconditioner not fitted": (
        lambda: CgIHVP(model, [plain().train], 0.1, preconditioner=EKFACIHVP(model)).solve(random_vectors(model)),
        RuntimeError,
        r"EKFACIHVP is not fitted",
    ),
    "samples": (lambda: JacobiPreconditioner(samples=0), ValueError, r"samples must be positive, got 0"),
    "rank of a preconditioner": (lambda: NystroemPreconditioner(rank=0), ValueError, r"rank must be positive, got 0"),
    "on_failure": (lambda: LissaIHVP(model, on_failure="ignore"), ValueError, r"on_failure must be one of .*'ignore'"),
    "scale": (lambda: LissaIHVP(model, scale=0.0), ValueError, r"scale must be positive, got 0\.0"),
    "dampen": (lambda: LissaIHVP(model, dampen=1.0), ValueError, r"dampen must be in \[0, 1\), got 1\.0"),
    "rank": (lambda: NystroemIHVP(model, rank=0), ValueError, r"rank must be positive, got 0"),
    "rank of a fraction": (lambda: ArnoldiIHVP(model, rank=2.5), TypeError, r"rank must be a whole number, got 2\.5"),
    "krylov_dimension": (
        lambda: ArnoldiIHVP(model, krylov_dimension=10),
        ValueError,
        r"krylov_dimension must be larger than rank=10, got 10",
    ),
    "complement": (lambda: ArnoldiIHVP(model, complement="no"), ValueError, r"complement must be one of dropped"),
    "block_structure": (lambda: CgIHVP(model, block_structure="rows"), ValueError, r"block_structure must be .*'rows'"),
    "empty loader": (lambda: CgIHVP(model, []), ValueError, r"the loader yielded no batch"),
    "empty batches": (lambda: CgIHVP(model, [rows(plain().train, slice(0))]), ValueError, r"yielded no example"),
    "Nystroem without damping": (
        lambda: NystroemIHVP(model, [plain().train], 0.0).solve(random_vectors(model)),
        torch.linalg.LinAlgError,
        r"block 'full': the hessian of rank 10 with 24 parameters is singular, its smallest eigenvalue is 0",
    ),
    "harmonic mean without damping": (
        lambda: InverseHarmonicMeanIHVP(model, [plain().train], 0.0).solve(random_vectors(model)),
        torch.linalg.LinAlgError,
        r"block 'full': .* singular, its smallest eigenvalue is 0; it needs a positive damping",
    ),
    "a singular block": (
        lambda: ExactIHVP(model, [plain().train], {"2.weight": 0.0, "0.weight": 1.0, "0.bias": 1.0},
                          block_structure="parameter").solve(random_vectors(model)),
        torch.linalg.LinAlgError,
        r"block '2\.weight': the hessian with damping 0 is singular: its smallest eigenvalue is [\d.e-]+",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str) -> None:
    call, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_data_that_is_not_finite_names_the_batch(curvature: str) -> None:
    data = tokens()
    own = data.model()
    first, second, *_ = batches(data.train, 8)
    bad = replace(second, args=(torch.full_like(second.args[0], torch.nan),))
    for cls in (CgIHVP, LissaIHVP, ArnoldiIHVP, NystroemIHVP):
        with pytest.raises(FloatingPointError, match=r"batch 1\b"):
            cls(own, [first, bad], 0.1, curvature=curvature)


def test_a_loader_that_can_be_read_once_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ihvp.methods.products, "KEPT_BYTES", 0)
    data = pooled()
    own = CgIHVP(data.model(), iter(batches(data.train, 8)), 0.1)
    with pytest.raises(ValueError, match=r"yielded no batch .*; it must .* be an object that can be iterated again"):
        own.solve(random_vectors(own.model))
