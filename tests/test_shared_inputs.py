"""Layers that read one input: what depends on it alone is computed once, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import ihvp
import pytest
import torch
from ihvp import Batch, ops
from nets import assert_near, squared_error
from torch import Tensor, nn


class Attention(nn.Module):
    """Queries, keys and values of one input, or, where `apart` of the example is set, of copies of it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 4)
        self.gate, self.out = nn.Linear(6, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        inputs = [x.clone() for _ in range(4)] if bool(apart.any()) else [x] * 4
        q, k, v, gate = (f(one) for f, one in zip((self.query, self.key, self.value, self.gate), inputs, strict=True))
        mixed = torch.tanh(q @ k.mT) @ v
        return self.out(mixed * torch.sigmoid(gate))


def batch(T: int, masked: bool) -> Batch:
    N = 7
    mask = (torch.arange(T) < torch.randint(1, T + 1, (N, 1))) if masked else None
    x, targets = (torch.randn(N, T, features, dtype=torch.float64) for features in (6, 2))
    return Batch((x, torch.zeros(N, dtype=torch.bool)), targets=targets, mask=mask)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> Counter[tuple[int, ...]]:
    """Calls of an op by the shape of its first argument."""
    calls: Counter[tuple[int, ...]] = Counter()
    plainly = getattr(ops, name)

    def call(first: Tensor, *args: Any, **options: Any) -> Any:
        calls[tuple(first.shape)] += 1
        return plainly(first, *args, **options)

    monkeypatch.setattr(ops, name, call)
    return calls


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("T", [1, 3, 40])  # at 40 it is cheaper to rotate gradients, for each layer
@pytest.mark.parametrize("method", [ihvp.KFACIHVP, ihvp.EKFACIHVP])
def test_the_fit_is_that_of_layers_with_inputs_of_their_own(
    method: Any, T: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = ihvp.InfluenceModel(Attention().double(), squared_error, progress=False)
    shared = [batch(T, masked) for _ in range(3)]
    apart = [replace(one, args=(one.args[0], ~one.args[1])) for one in shared]
    covariances, projections = counted(monkeypatch, "covariance_update_"), counted(monkeypatch, "eigenbasis_project")
    own = method(model, shared, damping=0.1)
    # queries, keys and values have one sum of their inputs; the gate, without a bias, its own
    assert covariances[7, 7] == 3 and covariances[6, 6] == 3
    assert projections.total() == (3 * 4 if method is ihvp.EKFACIHVP and T < 40 else 0)
    others = [method(model, apart, damping=0.1), method(model, [apart[0], *shared[1:]], damping=0.1)]
    V = {name: torch.randn(2, *layer.shape, dtype=torch.float64) for name, layer in model.layers.items()}
    for other in others:
        for name, (A, G) in own.kfac_blocks.items():
            assert_near(other.kfac_blocks[name][0], A)
            assert_near(other.kfac_blocks[name][1], G)
        for name, solved in own.solve(V).items():
            assert_near(other.solve(V)[name], solved, 1e-9)
