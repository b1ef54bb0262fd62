"""IHVP objects against dense float64 matrices, by identities, and through their files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ihvp
import ihvp.methods.base
import pytest
import torch
from ihvp import EKFACIHVP, KFACIHVP, Batch, ExactIHVP, FisherIHVP, InfluenceModel
from ihvp.model import draw_classes
from nets import (
    F32,
    F64,
    METHODS,
    PROBLEMS,
    Vectors,
    assert_near,
    batches,
    chain,
    cross_entropy,
    factors,
    fisher,
    flat,
    gauss_newton,
    gradients,
    hessian,
    kfac,
    plain,
    random_vectors,
    rows,
    squared_error,
    tokens,
)
from torch import Tensor, nn

DAMPING = 0.3
FITTED = [name for name in METHODS if name != "identity"]
SAMPLING = ["diagonal", "fisher", "kfac pi", "kfac none", "ekfac"]


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


def assert_near_each(got: Vectors, want: Vectors, relative: float | None = None) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_near(x, want[name], relative)


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


# --- ExactIHVP ---------------------------------------------------------------------------------------------------


def test_pseudo_inverse_ignores_small_eigenvalues() -> None:
    """Softmax regression: adding a number to every logit's weights changes nothing, so the Hessian is singular."""
    data = plain()
    net = nn.Sequential(nn.Linear(4, 3)).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    H = hessian(model, data.train)
    V = random_vectors(model)
    with pytest.raises(torch.linalg.LinAlgError, match=r"hessian with damping 0 is singular.*larger damping.*rcond"):
        ExactIHVP(model, [data.train]).solve(V)
    P = ExactIHVP(model, [data.train], rcond=1e-9).solve(V)
    inverse = torch.linalg.pinv(H, rtol=1e-9, hermitian=True)
    assert torch.linalg.matrix_rank(inverse) == 10
    assert_near(flat(P), flat(V) @ inverse)


def test_train_hessian_takes_the_place_of_a_fit() -> None:
    data = tokens()
    model = data.model()
    V = random_vectors(model)
    given = ExactIHVP(model, train_hessian=hessian(model, data.train), damping=DAMPING)
    assert given.is_fitted
    assert_near_each(given.solve(V), ExactIHVP(model, [data.train], damping=DAMPING).solve(V))


def test_gauss_newton_of_a_net_with_one_number_an_example() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    model = InfluenceModel(net, lambda outputs, targets: (outputs - targets).square(), progress=False)
    data = Batch(args=(torch.randn(9, 4, dtype=F64),), targets=torch.randn(9, dtype=F64))
    V = random_vectors(model)
    got = ExactIHVP(model, batches(data, 4), curvature="gauss_newton").multiply(V)
    assert_near(flat(got), flat(V) @ gauss_newton(model, data))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("method", ["hessian", "gauss_newton", "fisher", "ekfac"])
def test_modules_with_the_same_parameters_are_one_layer(method: str) -> None:
    torch.manual_seed(0)
    model = InfluenceModel(Tied().double(), squared_error, progress=False)
    data = Batch(args=(torch.randn(30, 4, dtype=F64),), targets=torch.randn(30, 4, dtype=F64))
    assert list(model.layers) == ["first"]
    curvature = METHODS[method](model, batches(data, 8))
    V = random_vectors(model)
    if method != "ekfac":
        assert_near(flat(curvature.multiply(V)), flat(V) @ METHODS[method].F(model, data))
    else:
        U_A, U_G = curvature.evecs["first"]
        assert_near(curvature.evals["first"], (U_G.T @ gradients(model, data)["first"] @ U_A).square().mean(0))


# --- invariances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", FITTED)
def test_one_batch_of_64_is_eight_of_8(method: str, problem: str) -> None:
    data = PROBLEMS[problem](64)
    model = data.model()
    V = random_vectors(model)
    one, eight = (METHODS[method](model, batches(data.train, size), damping=DAMPING) for size in (64, 8))
    assert_near_each(one.multiply(V), eight.multiply(V), 1e-13)
    assert_near_each(one.solve(V), eight.solve(V), 1e-13)


@pytest.mark.parametrize("method", FITTED)
def test_an_empty_batch_adds_nothing(method: str) -> None:
    data = tokens()
    model = data.model()
    V = random_vectors(model)
    first, *others = batches(data.train, 8)
    with_empty = METHODS[method](model, [first, rows(first, slice(0)), *others], damping=DAMPING)
    assert_near_each(with_empty.solve(V), METHODS[method](model, [first, *others], damping=DAMPING).solve(V))


@pytest.mark.parametrize("method", ["diagonal", "fisher", "hessian", "gauss_newton"])
def test_a_mask_of_one_position_weighs_an_example_with_zero(method: str) -> None:
    """(N,1) masks examples of a plain net, for the captured tokens and for the loss alike."""
    data = plain()
    model = data.model()
    V = random_vectors(model)
    kept = torch.arange(29) % 3 > 0
    masked = METHODS[method](model, [replace(data.train, mask=kept.unsqueeze(1))])
    weighted = METHODS[method](model, [replace(data.train, weights=kept.double())])
    assert_near_each(masked.multiply(V), weighted.multiply(V))


@pytest.mark.parametrize("method", SAMPLING)
def test_sampled_targets_do_not_depend_on_the_batch_size(method: str) -> None:
    data = tokens(64)
    model = data.model()
    V = random_vectors(model)
    one, eight = (METHODS[method](model, batches(data.train, size), fisher="sampled") for size in (64, 8))
    assert_near_each(one.solve(V, DAMPING), eight.solve(V, DAMPING), 1e-13)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
@pytest.mark.parametrize("method", SAMPLING)
def test_two_fits_are_bitwise_equal(method: str, fisher: str) -> None:
    data = tokens(64)
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8), fisher=fisher)
    first = {name: x.clone() for name, x in curvature.state_dict().items()}
    torch.rand(3)  # the global generator does not matter
    assert same(first, METHODS[method](model, batches(data.train, 8), fisher=fisher).state_dict())
    assert same(first, curvature.fit(batches(data.train, 8)).state_dict())
    other = METHODS[method](model, batches(data.train, 8), fisher=fisher, seed=1).state_dict()
    assert same(first, other) == (fisher == "empirical")


@pytest.mark.parametrize("method", ["hessian", "gauss_newton", "ekfac uncorrected"])
def test_two_fits_of_the_others_are_bitwise_equal(method: str) -> None:
    data = tokens(64)
    model = data.model()
    one, other = (METHODS[method](model, batches(data.train, 8)).state_dict() for _ in range(2))
    assert same(one, other)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
def test_caller_may_have_switched_gradients_off(method: str, caller: Callable[[], Any]) -> None:
    data = plain()
    model = data.model()
    V = random_vectors(model)
    want = METHODS[method](model, batches(data.train, 8), damping=DAMPING)
    with caller():
        got = METHODS[method](model, batches(data.train, 8), damping=DAMPING)
        assert_near_each(got.solve(V), want.solve(V))
        assert_near_each(got.compute_ihvp([data.train]), want.compute_ihvp([data.train]))
    assert_near_each(got.multiply(V), want.multiply(V))


# --- sampled targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fisher", "kfac none", "ekfac"])
def test_sampled_fisher_converges_to_the_true_one(method: str) -> None:
    """Softmax regression: F = mean_n (diag(p_n) - p_n p_n^T) (x) x_n x_n^T, whatever the targets of the data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3)).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    x, copies = torch.randn(1 if "kfac" in method else 5, 3, dtype=F64), 4000
    p = net(x).softmax(1).detach()
    written_out = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    true = sum(
        torch.kron(q.diag() - torch.outer(q, q), torch.outer(z, z)) for q, z in zip(p, written_out, strict=True)
    ) / len(x)
    data = Batch(args=(x.repeat(copies, 1),), targets=torch.zeros(copies * len(x), dtype=torch.long))
    curvature = METHODS[method](model, batches(data, 2000), fisher="sampled", damping=DAMPING)
    if method == "ekfac":
        Q = torch.kron(*reversed(curvature.evecs["0"]))
        assert_near(curvature.evals["0"].flatten(), (Q.T @ true @ Q).diagonal(), 0.03)
    else:
        eye = {"0": torch.eye(len(true), dtype=F64).view(-1, 3, 4)}
        assert_near(flat(curvature.multiply(eye)), true, 0.03)
    empirical = METHODS[method](model, batches(data, 2000), damping=DAMPING)
    assert float((flat(empirical.multiply(random_vectors(model))) - flat(random_vectors(model)) @ true).norm()) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_both_passes_of_ekfac_draw_the_same_targets(seed: int) -> None:
    """For one example the eigenvalues are then the products of those of G and A, whatever was drawn."""
    data = plain(N=1)
    curvature = EKFACIHVP(data.model(), [data.train], fisher="sampled", seed=seed)
    for name, (A, G) in curvature.kfac_blocks.items():
        assert_near(curvature.evals[name], torch.outer(torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(A)))


LAYOUTS = {
    "(N,C)": ((400,), lambda logits: logits),
    "(N,T,C)": ((100, 4), lambda logits: logits),
    "(N,C,T)": ((100, 4), lambda logits: logits.movedim(-1, 1)),
    "an object with logits": ((100, 4), lambda logits: type("Output", (), {"logits": logits})()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_classes_follow_the_softmax_over_classes_and_ignored_ones_stay(layout: str) -> None:
    shape, laid_out = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.6, 0.3], dtype=F64)
    targets = torch.randint(3, shape, generator=generator)
    targets[0] = -100
    drawn = torch.stack([draw_classes(laid_out(p.log().expand(*shape, 3)), targets, generator) for _ in range(50)])
    assert drawn.dtype == targets.dtype
    assert (drawn[:, 0] == -100).all()
    counts = drawn[:, 1:].flatten().bincount(minlength=3)
    assert_near(counts / counts.sum(), p, 0.02)


@pytest.mark.parametrize("method", SAMPLING)
def test_ignored_targets_contribute_nothing_to_a_sampled_fisher(method: str) -> None:
    data = tokens(40)
    model = data.model()
    V = random_vectors(model)
    ignored = torch.where(data.train.mask, data.train.targets, -100)
    marked = Batch(args=data.train.args, targets=ignored, mask=data.train.mask)
    curvature = METHODS[method](model, [data.train], fisher="sampled")
    assert_near_each(METHODS[method](model, [marked], fisher="sampled").multiply(V), curvature.multiply(V))


def test_targets_may_be_drawn_by_the_user() -> None:
    """Squared error is the loss of a unit normal distribution: its true Fisher matrix is Gauss-Newton's.

    What is drawn is a constant, even where it was made of outputs that autograd follows.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).double()

    def normal(outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return outputs + torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)

    model = InfluenceModel(net, squared_error, sample_targets=normal, progress=False)
    data = Batch(args=(torch.randn(5, 3, dtype=F64).repeat(4000, 1),), targets=torch.zeros(20000, 2, dtype=F64))
    curvature = FisherIHVP(model, batches(data, 4000), fisher="sampled")
    eye = {"0": torch.eye(8, dtype=F64).view(8, 2, 4)}
    few = Batch(args=(data.args[0][:5],), targets=data.targets[:5])
    assert_near(flat(curvature.multiply(eye)), gauss_newton(model, few), 0.03)


# --- damping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diagonal", "kfac pi", "kfac none", "ekfac", "ekfac uncorrected"])
def test_auto_damping_is_a_tenth_of_each_layers_mean_eigenvalue(method: str) -> None:
    data = PROBLEMS["pooled"]()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8), damping="auto")
    V = random_vectors(model)
    dampings = {name: 0.1 * float(Lambda.mean()) for name, Lambda in curvature.evals.items()}
    assert len(set(dampings.values())) == len(dampings)
    for name, value in dampings.items():
        want = curvature.solve(V, damping=value)[name]
        assert_near(curvature.solve(V)[name], want)
        assert_near(curvature.solve(V, damping="auto")[name], want)


@pytest.mark.parametrize("method", ["fisher", "gauss_newton"])
@pytest.mark.parametrize("N", [5, 60])
def test_auto_damping_is_a_tenth_of_the_mean_eigenvalue_of_the_matrix(method: str, N: int) -> None:
    data, own = plain(N), METHODS[method]
    model = data.model()
    F = own.F(model, data.train)
    V = random_vectors(model)
    value = 0.1 * float(torch.linalg.eigvalsh(F).mean())
    got = flat(own(model, [data.train], damping="auto").solve(V))
    assert_near(got, torch.linalg.solve(F + value * torch.eye(len(F), dtype=F64), flat(V).T).T)


@pytest.mark.parametrize("dampings", [(0.1,), [3.0, 0.1, 1e-3], [0.2, "auto"], []], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_several_dampings_are_one_by_one(method: str, dampings: Any) -> None:
    data = tokens()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8))
    V = random_vectors(model)
    together = curvature.solve(V, damping=dampings)
    for name, layer in model.layers.items():
        assert together[name].shape == (len(dampings), 4, *layer.shape)
        for i, value in enumerate(dampings):
            assert_near(together[name][i], curvature.solve(V, damping=value)[name])


@pytest.mark.parametrize(("options", "split"), [({"use_pi": True}, "pi"), ({"use_pi": False}, "even"), ({}, "pi")])
def test_split_of_the_damping_in_the_seeds_words(options: dict[str, Any], split: str) -> None:
    data = tokens()
    model = data.model()
    V = random_vectors(model)
    got = KFACIHVP(model, [data.train], damping=DAMPING, **options).solve(V)
    assert_near(flat(got), torch.linalg.solve(kfac(model, data.train, DAMPING, split), flat(V).T).T)


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


# --- state and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_object_solves_bitwise_the_same(method: str, tmp_path: Path) -> None:
    data, own = tokens(), METHODS[method]
    model = data.model()
    sampled = {"fisher": "sampled", "seed": 3} if method in SAMPLING else {}
    curvature = own(model, batches(data.train, 8), damping=0.25, **sampled)
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    assert os.listdir(tmp_path) == [path.name]
    loaded = ihvp.load(path, model)
    assert type(loaded) is own.cls and loaded.is_fitted
    V = random_vectors(model)
    assert same(loaded.solve(V), curvature.solve(V))
    assert same(loaded.multiply(V), curvature.multiply(V))
    assert same(loaded.compute_ihvp(data.tests), curvature.compute_ihvp(data.tests))
    assert same(loaded.state_dict(), curvature.state_dict())
    assert loaded._config() == curvature._config()


def test_a_bare_layer_as_net_can_be_saved(tmp_path: Path) -> None:
    model = InfluenceModel(nn.Linear(4, 3), cross_entropy, progress=False)
    curvature = EKFACIHVP(model, [(torch.randn(9, 4), torch.randint(3, (9,)))])
    curvature.save(str(tmp_path / "file"))
    assert same(ihvp.load(str(tmp_path / "file"), model).state_dict(), curvature.state_dict())


def test_a_loaded_fit_can_be_replaced_by_another(tmp_path: Path) -> None:
    data = plain()
    model = data.model()
    EKFACIHVP(model, batches(data.train, 8), damping=DAMPING).save(tmp_path / "file")
    loaded = ihvp.load(tmp_path / "file", model)
    loaded.fit(data.tests)
    assert same(loaded.state_dict(), EKFACIHVP(model, data.tests).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_file_can_be_loaded_for_a_model_of_another_dtype(method: str, tmp_path: Path) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8), damping=DAMPING)
    want = curvature.solve(random_vectors(model))
    curvature.save(tmp_path / "file")
    data.net.float()
    for name, x in ihvp.load(tmp_path / "file", model).solve(random_vectors(model)).items():
        assert x.dtype == F32
        assert_near(x, want[name])


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[EKFACIHVP, Path]]:
    data = plain()
    curvature = EKFACIHVP(data.model(), batches(data.train, 8))
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    yield curvature, path


FAILING = {"writing": (ihvp.methods.base, "save_file"), "moving into place": (os, "replace")}


@pytest.mark.parametrize("step", FAILING)
def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    step: str, saved: tuple[EKFACIHVP, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature, path = saved
    before = path.read_bytes()

    def fails(first: Any, second: Any, **options: Any) -> None:
        if step == "writing":
            Path(second).write_bytes(b"half of it")
        raise OSError("no space left on device")

    place, name = FAILING[step]
    monkeypatch.setattr(place, name, fails)
    with pytest.raises(OSError, match="no space left"):
        curvature.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_saved_file_can_be_read_by_whom_the_umask_allows(saved: tuple[EKFACIHVP, Path]) -> None:
    _, path = saved
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


WRONG_STATES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda state: {},
    "a tensor less": lambda state: dict(list(state.items())[1:]),
    "a tensor more": lambda state: {**state, "other": torch.zeros(3)},
    "another shape": lambda state: {**state, next(iter(state)): torch.zeros(7, 5)},
    "another layer": lambda state: {f"other/{name}": x for name, x in state.items()},
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
@pytest.mark.parametrize("method", FITTED)
def test_a_wrong_state_is_refused_and_changes_nothing(method: str, wrong: str) -> None:
    data, own = plain(), METHODS[method]
    model = data.model()
    curvature = own(model, batches(data.train, 8))
    before = {name: x.clone() for name, x in curvature.state_dict().items()}
    with pytest.raises(ValueError, match=own.cls.__name__):
        curvature.load_state_dict(WRONG_STATES[wrong](before))
    assert same(curvature.state_dict(), before)


def test_a_state_that_is_taken_over_is_copied() -> None:
    data = plain()
    model = data.model()
    for method in FITTED:
        curvature, other = METHODS[method](model, [data.train]), METHODS[method](model)
        state = {name: x.clone() for name, x in curvature.state_dict().items()}
        other.load_state_dict(state)
        for x in state.values():
            x.zero_()
        assert same(other.state_dict(), curvature.state_dict())


@pytest.mark.parametrize("method", FITTED)
def test_a_new_fit_forgets_the_old_one(method: str) -> None:
    """Also what a solve keeps for the next one."""
    data = plain()
    model = data.model()
    V = random_vectors(model)
    curvature = METHODS[method](model, [data.train], damping=DAMPING)
    old = curvature.solve(V)
    again = curvature.fit(data.tests).solve(V)
    assert same(again, METHODS[method](model, data.tests, damping=DAMPING).solve(V))
    assert not same(again, old)


class Failing:
    """A loader that fails in its last batch, in the given pass."""

    def __init__(self, data: list[Batch], at: int) -> None:
        self.data, self.at, self.passes = data, at, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from self.data[:-1]
        if self.passes >= self.at:
            raise OSError("the disk is gone")
        yield self.data[-1]


@pytest.mark.parametrize(("method", "at"), [*((name, 1) for name in FITTED), ("ekfac", 2)])
def test_a_fit_that_fails_leaves_the_earlier_one(method: str, at: int) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8))
    before = {name: x.clone() for name, x in curvature.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        curvature.fit(Failing(list(data.tests), at))
    assert same(curvature.state_dict(), before)
    fresh = METHODS[method](model)
    with pytest.raises(OSError, match="the disk is gone"):
        fresh.fit(Failing(list(data.tests), at))
    assert not fresh.is_fitted
