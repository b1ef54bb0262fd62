"""IHVP objects against dense float64 matrices, and where theory says that they are exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ihvp import EKFACIHVP, KFACIHVP, Batch, FisherIHVP, InfluenceModel
from method_cases import DAMPING, same
from nets import (
    F32,
    F64,
    METHODS,
    PROBLEMS,
    Vectors,
    assert_near,
    batches,
    chain,
    factors,
    fisher,
    flat,
    gauss_newton,
    gradients,
    plain,
    random_vectors,
    squared_error,
)
from torch import Tensor, nn


def scaled(V: Vectors, factor: Any) -> Vectors:
    return {name: v * (factor[name] if isinstance(factor, dict) else factor) for name, v in V.items()}


# --- against the definitions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("cls", [KFACIHVP, EKFACIHVP])
def test_factors_are_second_moments(cls: type[Any], problem: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    curvature = cls(model, batches(data.train, 8))
    for name, (A, G) in factors(model, data.train).items():
        got_A, got_G = curvature.kfac_blocks[name]
        assert_near(got_A, A)
        assert_near(got_G, G)
        for U, M in zip(curvature.evecs[name], (A, G), strict=True):
            assert_near(U.T @ U, torch.eye(len(U), dtype=F64))
            rotated = U.T @ M @ U
            assert_near(rotated, rotated.diagonal().diag())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_eigenvalues_are_second_moments_of_rotated_gradients(problem: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    curvature = EKFACIHVP(model, batches(data.train, 8))
    uncorrected = EKFACIHVP(model, batches(data.train, 8), update_eigen=False)
    for name, g in gradients(model, data.train).items():
        U_A, U_G = curvature.evecs[name]
        assert_near(curvature.evals[name], (U_G.T @ g @ U_A).square().mean(0))
        A, G = uncorrected.kfac_blocks[name]
        assert_near(uncorrected.evals[name], torch.outer(torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(A)))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_multiply_and_solve_are_those_of_the_dense_matrix(method: str, problem: str) -> None:
    data, own = PROBLEMS[problem](), METHODS[method]
    model = data.model()
    curvature = own(model, batches(data.train, 8), damping=DAMPING)
    V = random_vectors(model)
    F = own.F(model, data.train)
    assert_near(flat(curvature.multiply(V)), flat(V) @ F)
    assert_near(flat(curvature.solve(V)), torch.linalg.solve(own.damped(model, data.train, DAMPING), flat(V).T).T)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("kfac pi", "kfac even")])
def test_damped_curvature_times_solution_gives_the_vector_back(method: str, problem: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8))
    V = random_vectors(model)
    P = curvature.solve(V, damping=DAMPING)
    assert_near(flat(curvature.multiply(P)) + DAMPING * flat(P), flat(V))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("N", [5, 60], ids=["N < p", "N >= p"])
def test_fisher_solves_alike_by_its_kernel_and_by_its_matrix(N: int, problem: str) -> None:
    data = PROBLEMS[problem](N)
    model = data.model()
    curvature = FisherIHVP(model, batches(data.train, 4), damping=1e-2)
    assert ("full/sum" in curvature.state_dict()) == (model.nb_params <= N)
    F = fisher(model, data.train)
    V = random_vectors(model)
    assert_near(flat(curvature.multiply(V)), flat(V) @ F)
    damped = F + 1e-2 * torch.eye(len(F), dtype=F64)
    assert_near(flat(curvature.solve(V)), torch.linalg.solve(damped, flat(V).T).T)


@pytest.mark.parametrize("method", METHODS)
def test_float32_model(method: str) -> None:
    """Factors are sums in float64 of float32 data: the float64 answer to float32 rounding."""
    data, own = plain(), METHODS[method]
    model = data.model()
    want = own(model, batches(data.train, 8), damping=DAMPING).solve(random_vectors(model))
    data.net.float()
    train = Batch(args=(data.train.args[0].float(),), targets=data.train.targets)
    got = own(model, batches(train, 8), damping=DAMPING).solve(random_vectors(model))
    assert model.dtype == F32
    for name, x in got.items():
        assert x.dtype == F32
        assert_near(x, want[name])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_model_has_float32_factors(method: str) -> None:
    data, own = plain(), METHODS[method]
    model = data.model()
    V = random_vectors(model)
    want = flat(own(model, batches(data.train, 8), damping=DAMPING).solve(V))
    data.net.bfloat16()
    train = Batch(args=(data.train.args[0].bfloat16(),), targets=data.train.targets)
    curvature = own(model, batches(train, 8), damping=DAMPING)
    got = curvature.solve(random_vectors(model))
    assert all(x.dtype == F32 for x in got.values())
    assert all(x.dtype in (F32, F64, torch.int64) for x in curvature.state_dict().values() if method != "fisher")
    assert_near(flat(got), want, relative=0.05)


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_results_have_the_models_dtype_whatever_the_vectors_have(method: str, dtype: torch.dtype) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, [data.train], damping=DAMPING)
    V = {name: v.to(dtype) for name, v in random_vectors(model).items()}
    exact = {name: v.to(model.dtype) for name, v in V.items()}
    for ask in (curvature.solve, curvature.multiply):
        got = ask(V)
        assert all(x.dtype == model.dtype for x in got.values())
        assert same(got, ask(exact))


# --- where theory says that an approximation is exact ------------------------------------------------------------


@pytest.mark.parametrize("cls", [KFACIHVP, EKFACIHVP])
def test_kronecker_is_exact_for_one_example(cls: type[Any]) -> None:
    data = plain(N=1)
    model = data.model()
    V = random_vectors(model)
    got = cls(model, [data.train]).multiply(V)
    for name, g in gradients(model, data.train).items():
        block = g.flatten(1).T @ g.flatten(1)
        assert_near(got[name].flatten(1), V[name].flatten(1) @ block)


def deep_linear() -> tuple[InfluenceModel, Batch]:
    """A deep linear net with squared error; every input meets every residual +- sqrt(3) e_k.

    Residuals are then independent of inputs with second moment I, and so are the deltas of every layer, whose Jacobian
    does not depend on the input: each block of the Fisher matrix, which here is the Gauss-Newton matrix, is G (x) A.
    """
    torch.manual_seed(0)
    net = chain(4, 5, 4, 3, between=nn.Identity).double()
    residuals = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    inputs = torch.randn(7, 4, dtype=F64).repeat_interleave(len(residuals), 0)
    targets = net(inputs).detach() + residuals.repeat(7, 1)
    return InfluenceModel(net, squared_error, progress=False), Batch(args=(inputs,), targets=targets)


@pytest.mark.parametrize("method", ["kfac none", "ekfac", "ekfac uncorrected"])
@pytest.mark.parametrize("truth", [fisher, gauss_newton])
def test_kronecker_is_exact_for_a_deep_linear_net(method: str, truth: Callable[..., Tensor]) -> None:
    model, data = deep_linear()
    sizes = [O * I for O, I in (layer.shape for layer in model.layers.values())]
    F = truth(model, data)
    block_diagonal = torch.block_diag(*[torch.ones(n, n, dtype=F64) for n in sizes]) * F
    V = random_vectors(model)
    curvature = METHODS[method](model, batches(data, 10), damping=DAMPING)
    assert_near(flat(curvature.multiply(V)), flat(V) @ block_diagonal)
    damped = block_diagonal + DAMPING * torch.eye(len(F), dtype=F64)
    assert_near(flat(curvature.solve(V)), torch.linalg.solve(damped, flat(V).T).T)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_eigenvalue_correction_is_exact_on_its_diagonal_and_nearer_than_kfac(problem: str) -> None:
    """In its basis it has the diagonal of the Fisher block, the nearest diagonal there is (George et al. 2018)."""
    data = PROBLEMS[problem]()
    model = data.model()
    curvature = EKFACIHVP(model, batches(data.train, 8))
    for name, g in gradients(model, data.train).items():
        block = g.flatten(1).T @ g.flatten(1) / len(g)
        Q = torch.kron(*reversed(curvature.evecs[name]))
        rotated = Q.T @ block @ Q
        assert_near(curvature.evals[name].flatten(), rotated.diagonal())
        A, G = curvature.kfac_blocks[name]
        corrected = Q * curvature.evals[name].flatten() @ Q.T
        assert float((block - corrected).norm()) <= float((block - torch.kron(G, A)).norm())


def test_gauss_newton_is_the_hessian_of_a_linear_net_with_squared_error() -> None:
    torch.manual_seed(0)
    net = chain(4, 3).double()
    model = InfluenceModel(net, squared_error, progress=False)
    data = Batch(args=(torch.randn(9, 4, dtype=F64),), targets=torch.randn(9, 3, dtype=F64))
    V = random_vectors(model)
    products = [flat(METHODS[name](model, batches(data, 4)).multiply(V)) for name in ("hessian", "gauss_newton")]
    assert_near(*products)


# --- products for the examples of a loader -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_compute_ihvp_and_hvp(method: str) -> None:
    data, own = PROBLEMS["tokens"](), METHODS[method]
    model = data.model()
    curvature = own(model, batches(data.train, 8), damping=DAMPING)
    F, damped = own.F(model, data.train), own.damped(model, data.train, DAMPING)
    g = torch.cat([flat(gradients(model, batch)) for batch in data.tests])
    assert_near(flat(curvature.compute_ihvp(data.tests)), torch.linalg.solve(damped, g.T).T)
    assert_near(flat(curvature.compute_hvp(data.tests)), g @ F)
    V, W = random_vectors(model), scaled(random_vectors(model, 2), 3.0)
    v = torch.cat([flat(V), flat(W)])
    kept = {name: x.clone() for name, x in V.items()}
    assert_near(flat(curvature.compute_ihvp([V, W], use_gradient=False)), torch.linalg.solve(damped, v.T).T)
    assert_near(flat(curvature.compute_hvp([V, W], use_gradient=False)), v @ F)
    assert same(V, kept)
