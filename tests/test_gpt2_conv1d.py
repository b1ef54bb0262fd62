"""The linear layer of GPT-2, whose weight is (I,O), against an nn.Linear with that weight turned."""

from __future__ import annotations

import copy

import pytest
import torch
from ihvp import Batch, FirstOrderInfluenceCalculator, InfluenceModel
from ihvp.layers import layer_types
from nets import F64, METHODS, assert_near, cross_entropy, flat
from torch import Tensor, nn


class Conv1D(nn.Module):
    """As `transformers` has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 4), nn.Parameter(torch.randn(nf) / 4)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


def nets() -> tuple[nn.Module, nn.Module, Batch]:
    torch.manual_seed(0)
    own = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).double()
    turned = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for one, other in ((own[0], turned[0]), (own[2], turned[2])):
            other.weight.copy_(one.weight.T)
            other.bias.copy_(one.bias)
    x, y = torch.randn(11, 3, 4, dtype=F64), torch.randint(3, (11, 3))
    return own, turned, Batch(args=(x,), targets=y, mask=torch.arange(3) < torch.randint(1, 4, (11, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_the_same_layer(method: str) -> None:
    *both, data = nets()
    found = []
    for net in both:
        model = InfluenceModel(net, cross_entropy, progress=False)
        calculator = FirstOrderInfluenceCalculator(model, [data], METHODS[method](model, [data], damping=0.3))
        apart = [next(calculator.scores_by_token([data], of=of))[1] for of in ("position", "loss")]
        V = calculator.curvature.compute_ihvp([data])
        found.append((calculator.scores([data]), *apart, flat(V), flat(calculator.curvature.multiply(V))))
    for got, want in zip(*found, strict=True):
        assert_near(got, want)


def test_parameters_there_and_back() -> None:
    own, turned, _ = nets()
    layer, other = (next(iter(InfluenceModel(net, cross_entropy).layers.values())) for net in (own, turned))
    assert layer.shape == other.shape == (5, 5)
    assert torch.equal(layer.matrix(), other.matrix())
    matrix = layer.matrix()
    for key, part in layer.split(matrix).items():
        assert torch.equal(part, layer.parameters()[key])
        assert part.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr(), "a view"


def test_a_class_of_that_name_elsewhere_is_none() -> None:
    other = copy.deepcopy(Conv1D)
    assert len(layer_types(Conv1D(2, 3))) == 1
    local = type("Conv1D", (other,), {"__module__": "mine"})
    assert layer_types(local(2, 3)) == ()
