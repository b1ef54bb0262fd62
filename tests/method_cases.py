"""What the tests of IHVP objects share."""

from __future__ import annotations

import torch
from nets import METHODS, Vectors, assert_near
from torch import Tensor

DAMPING = 0.3
FITTED = [name for name in METHODS if name != "identity"]
SAMPLING = ["diagonal", "fisher", "kfac pi", "kfac none", "ekfac"]


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


def assert_near_each(got: Vectors, want: Vectors, relative: float | None = None) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert_near(x, want[name], relative)
