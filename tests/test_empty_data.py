"""Loaders that yield nothing, and layers that no batch reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ihvp import EKFACIHVP, KFACIHVP, ExactIHVP
from method_cases import FITTED
from nets import METHODS
from sound_problem import calculator, check, ekfac, loader, model, own
from torch import Tensor, nn

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
