"""What must not change a fit: batch sizes, empty batches, a second run, the caller's grad mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from method_cases import DAMPING, FITTED, SAMPLING, assert_near_each, same
from nets import METHODS, PROBLEMS, batches, plain, random_vectors, rows, tokens


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
