"""ExactIHVP: pseudo-inverse, a given Hessian, shared parameters."""

from __future__ import annotations

import pytest
import torch
from ihvp import Batch, ExactIHVP, InfluenceModel
from method_cases import DAMPING, assert_near_each
from nets import (
    F64,
    METHODS,
    assert_near,
    batches,
    cross_entropy,
    flat,
    gauss_newton,
    gradients,
    hessian,
    plain,
    random_vectors,
    squared_error,
    tokens,
)
from torch import Tensor, nn


def test_pseudo_inverse_ignores_small_eigenvalues() -> None:
    """Softmax regression: adding a number to every logit's weights changes nothing, so the Hessian is singular."""
    data = plain()
    net = nn.Sequential(nn.Linear(4, 3)).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    H = hessian(model, data.train)
    V = random_vectors(model)
    with pytest.raises(torch.linalg.LinAlgError, match=r"hessian with damping 0 is singular.*larger damping.*rcond"):
        ExactIHVP(model, [data.train]).solve(V)
    P = ExactIHVP(model, [data.train], rcond=1e-9).solve(V)
    inverse = torch.linalg.pinv(H, rtol=1e-9, hermitian=True)
    assert torch.linalg.matrix_rank(inverse) == 10
    assert_near(flat(P), flat(V) @ inverse)


def test_train_hessian_takes_the_place_of_a_fit() -> None:
    data = tokens()
    model = data.model()
    V = random_vectors(model)
    given = ExactIHVP(model, train_hessian=hessian(model, data.train), damping=DAMPING)
    assert given.is_fitted
    assert_near_each(given.solve(V), ExactIHVP(model, [data.train], damping=DAMPING).solve(V))


def test_gauss_newton_of_a_net_with_one_number_an_example() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    model = InfluenceModel(net, lambda outputs, targets: (outputs - targets).square(), progress=False)
    data = Batch(args=(torch.randn(9, 4, dtype=F64),), targets=torch.randn(9, dtype=F64))
    V = random_vectors(model)
    got = ExactIHVP(model, batches(data, 4), curvature="gauss_newton").multiply(V)
    assert_near(flat(got), flat(V) @ gauss_newton(model, data))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("method", ["hessian", "gauss_newton", "fisher", "ekfac"])
def test_modules_with_the_same_parameters_are_one_layer(method: str) -> None:
    torch.manual_seed(0)
    model = InfluenceModel(Tied().double(), squared_error, progress=False)
    data = Batch(args=(torch.randn(30, 4, dtype=F64),), targets=torch.randn(30, 4, dtype=F64))
    assert list(model.layers) == ["first"]
    curvature = METHODS[method](model, batches(data, 8))
    V = random_vectors(model)
    if method != "ekfac":
        assert_near(flat(curvature.multiply(V)), flat(V) @ METHODS[method].F(model, data))
    else:
        U_A, U_G = curvature.evecs["first"]
        assert_near(curvature.evals["first"], (U_G.T @ gradients(model, data)["first"] @ U_A).square().mean(0))
