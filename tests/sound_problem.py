"""A problem whose every argument is right, for the tests of errors to spoil one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel
from nets import chain, cross_entropy, random_vectors
from torch import Tensor, nn

N = 6


def model(net: nn.Module | None = None, loss_fn: Any = cross_entropy, **options: Any) -> InfluenceModel:
    return InfluenceModel(chain(4, 5, 3) if net is None else net, loss_fn, progress=False, **options)


def data(N: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def sequences(**changes: Any) -> Batch:
    return replace(Batch(args=(torch.randn(N, 4, 4),), targets=torch.randint(3, (N, 4))), **changes)


def check(call: Callable[[], Any], error: type[BaseException] | tuple[type[BaseException], ...], match: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.search(match, str(caught.value), re.DOTALL), f"{caught.value!r} does not match {match!r}"


Case = tuple[Callable[[], Any], type[BaseException], str]


x, y = data()


def scores_of(batch: Any, net: nn.Module | None = None, loss_fn: Any = cross_entropy, **options: Any) -> Tensor:
    own = model(net, loss_fn, **options)
    return FirstOrderInfluenceCalculator(own, [batch], IdentityIHVP(own)).scores([batch])


torch.manual_seed(0)
own = model()
loader = [(x, y)]
ekfac = EKFACIHVP(own, loader)
V = random_vectors(own)


calculator = FirstOrderInfluenceCalculator(own, loader, ekfac)
