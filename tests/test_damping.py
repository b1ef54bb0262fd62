"""Dampings: automatic, several at once, split over the factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import KFACIHVP
from method_cases import DAMPING
from nets import F64, METHODS, PROBLEMS, assert_near, batches, flat, kfac, plain, random_vectors, tokens


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
