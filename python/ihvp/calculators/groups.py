"""Groups of examples: a group is a loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ihvp import ops
from ihvp.capture import capture
from ihvp.methods.base import Vectors, complete
from ihvp.model import InfluenceModel, Layer, LossFn

Groups = Iterable[Iterable[Any]]


def paired(train_groups: Groups, test_groups: Groups | None) -> list[tuple[Iterable[Any], Iterable[Any]]]:
    """Training groups with their test groups, or without such with themselves. ValueError on unequal numbers."""
    trains = list(train_groups)
    tests = trains if test_groups is None else list(test_groups)
    if len(trains) != len(tests):
        raise ValueError(f"train_groups and test_groups must be as many, got {len(trains)} and {len(tests)}")
    return list(zip(trains, tests, strict=True))


def gradient_sum(
    model: InfluenceModel, loader: Iterable[Any], *, measurement: LossFn | None = None
) -> tuple[Vectors, int]:
    """The sum of the gradients of a loader's examples, layer name -> (1,O,I'), and the number of examples."""
    total: Vectors = {}
    examples = 0

    def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        positions = a.shape[0] * a.shape[1]  # all of them as those of one example
        rows = None if mask is None else mask.reshape(1, positions)
        one = ops.per_sample_gradient(
            a.reshape(1, positions, -1), delta.reshape(1, positions, -1), mask=rows, bias=layer.bias
        )
        total[layer.name] = total[layer.name] + one if layer.name in total else one

    for index, (_, batch) in enumerate(model.passes(loader, "group")):
        if batch.size > 0:
            capture(model, batch, sink, index=index, measurement=measurement)
        examples += batch.size
    if examples == 0:
        raise ValueError("a group must hold examples, got none in any of its batches")
    return complete(model, total, 1), examples
