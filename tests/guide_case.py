"""The guide's net, of which `hidden` to `classifier` are watched, and the random data of its section 7."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def guide_net(
    widths: tuple[int, int, int, int] = (100, 64, 32, 10), activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    inputs, wide, narrow, outputs = widths
    modules = {
        "feature_extractor": nn.Linear(inputs, wide),
        "activation_1": activation(),
        "hidden": nn.Linear(wide, narrow),
        "activation_2": activation(),
        "classifier": nn.Linear(narrow, outputs),
    }
    return nn.Sequential(OrderedDict(modules))


def guide_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """100 training and 10 test examples."""
    return (torch.randn(100, 100), torch.randint(10, (100,))), (torch.randn(10, 100), torch.randint(10, (10,)))


def guide_loaders(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[DataLoader[Any], ...]:
    """Of the training data, of the test data, and of the half of the training data that the curvature sees."""
    half = [x[:50] for x in train]
    sizes = ((train, 32), (test, 10), (half, 8))
    return tuple(DataLoader(TensorDataset(*data), batch_size=size) for data, size in sizes)
