"""The Hessian put together from derivatives at the layers, where it may be, and row by row where it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ihvp.methods.layer_hessian
import pytest
import torch
from ihvp import Batch, ExactIHVP, InfluenceModel
from ihvp.methods.layer_hessian import layer_derivatives
from nets import F64, assert_near, batches, chain, cross_entropy, flat, hessian, random_vectors, within_blocks
from torch import Tensor, nn

N = 11
STRUCTURES: dict[str, Any] = {
    "full": "full",
    "layer": "layer",
    "parameter": "parameter",
    "custom": {"late": ["last", "second.bias"], "early": ["first", "second.weight"]},
}


class Branches(nn.Module):
    """A skip connection, a layer without a bias, and products of layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 3)
        self.first, self.second, self.gate = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.second(h)) * self.gate(x))


class Reuse(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(super().forward(x)))


class Beside(Branches):
    """A layer's weights are in the loss without the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.last.weight.square().sum()


class Positions(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze(1)


class Unreached(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def problem(net: nn.Module, layers: list[str] | None = None) -> tuple[InfluenceModel, Batch]:
    torch.manual_seed(0)
    net = net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    weights = torch.rand(N, dtype=F64) + 0.5
    batch = Batch(args=(torch.randn(N, 4, dtype=F64),), targets=torch.randint(3, (N,)), weights=weights)
    return InfluenceModel(net, cross_entropy, layers=layers, progress=False), batch


@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_the_dense_hessian(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch size, in one flush or many, in one product or one for each output."""
    own = STRUCTURES[structure]
    if structure == "custom":
        own = own | {"gate": ["gate"]}
    model, batch = problem(Branches())
    assert layer_derivatives(model, batch, 0) is not None
    want = within_blocks(own, hessian)(model, batch)
    V = random_vectors(model)
    for size, positions, workspace in ((N, 512, 2**22), (4, 512, 2**22), (3, 4, 1)):
        monkeypatch.setattr(ihvp.methods.layer_hessian, "POSITIONS", positions)
        monkeypatch.setattr(ihvp.methods.layer_hessian, "WORKSPACE", workspace)
        got = ExactIHVP(model, batches(batch, size), block_structure=own)
        assert_near(flat(got.multiply(V)), flat(V) @ want)


ROW_BY_ROW: dict[str, Callable[[], nn.Module]] = {
    "a layer used twice": Reuse,
    "weights used beside their layer": Beside,
    "several dimensions": Positions,
    "a layer that is not reached": Unreached,
}


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_other_nets_are_done_row_by_row(name: str) -> None:
    model, batch = problem(ROW_BY_ROW[name]())
    assert layer_derivatives(model, batch, 0) is None
    V = random_vectors(model)
    got = ExactIHVP(model, batches(batch, 4), 0.1)
    assert_near(flat(got.multiply(V)), flat(V) @ hessian(model, batch))


def test_derivatives_over_the_memory_limit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = problem(Branches())
    monkeypatch.setattr(ihvp.methods.layer_hessian, "BYTES", 8)
    assert layer_derivatives(model, batch, 0) is None


class Either(Branches):
    """The order of two layers depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if float(x[0, 0]) > 0:
            gate = self.gate(x)
            return self.last(gate * self.second(h))
        second = self.second(h)
        return self.last(self.gate(x) * second)


def test_layers_may_run_in_another_order_in_another_batch() -> None:
    model, batch = problem(Either())
    parts = batches(batch, 1)
    orders = {tuple(own.a) for own in (layer_derivatives(model, part, 0) for part in parts) if own is not None}
    assert len(orders) == 2
    V = random_vectors(model)
    assert_near(flat(ExactIHVP(model, parts).multiply(V)), flat(V) @ hessian(model, batch))


def test_frozen_layers_and_a_part_of_the_layers() -> None:
    net = chain(4, 5, 4, 3)
    net[0].requires_grad_(False)
    model, batch = problem(net, ["2", "4"])
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    assert layer_derivatives(model, batch, 0) is not None
    assert {name: p.requires_grad for name, p in net.named_parameters()} == before
    whole = InfluenceModel(net, cross_entropy, progress=False)
    first = whole.nb_params - model.nb_params
    V = random_vectors(model)
    want = flat(V) @ hessian(whole, batch)[first:, first:]
    assert_near(flat(ExactIHVP(model, [batch]).multiply(V)), want)


def test_a_derivative_that_is_not_finite_names_the_batch() -> None:
    net = chain(4, 3, between=nn.Identity)
    _, batch = problem(net)
    root = InfluenceModel(net, lambda out, y: (out * 0).abs().sum(1).sqrt(), progress=False)
    with pytest.raises(FloatingPointError, match=r"batch 1\b"):
        layer_derivatives(root, batch, 1)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(p.requires_grad for p in net.parameters())
