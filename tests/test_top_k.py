"""Scores in batches and the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dense_problem import DAMPING, Dense
from ihvp import Batch, FirstOrderInfluenceCalculator, Order
from nets import METHODS, assert_near, batches, plain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
