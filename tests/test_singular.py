"""Objects that are not fitted, and systems that are singular."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ihvp import ExactIHVP, FirstOrderInfluenceCalculator
from method_cases import FITTED
from nets import METHODS, assert_near, plain, random_vectors
from sound_problem import V, check, loader, own


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
