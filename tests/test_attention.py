"""Nets whose attention is a fused kernel, which has no second derivative, against the same net written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ihvp import (
    EKFACIHVP,
    Batch,
    CgIHVP,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
)
from nets import F64, assert_near, cross_entropy, flat
from torch import Tensor, nn


def written_out(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return ((q @ k.mT) / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).tanh()


def answers(attend: Callable[..., Tensor], ask: Callable[[InfluenceModel, list[Batch]], Tensor]) -> Tensor:
    model = InfluenceModel(Attention(attend), cross_entropy, progress=False)
    torch.manual_seed(4)
    return ask(model, [Batch(args=(torch.randn(5, 3, 4, dtype=F64),), targets=torch.randint(4, (5, 3)))])


def identity(model: InfluenceModel, data: list[Batch]) -> FirstOrderInfluenceCalculator:
    return FirstOrderInfluenceCalculator(model, data, IdentityIHVP(model))


def cg(model: InfluenceModel, data: list[Batch], curvature: str) -> Tensor:
    return flat(CgIHVP(model, data, damping=2.0, curvature=curvature, rtol=1e-12).compute_ihvp(data))


ASKED: dict[str, Callable[[InfluenceModel, list[Batch]], Any]] = {
    "ekfac": lambda model, data: flat(EKFACIHVP(model, data).compute_ihvp(data)),
    "hessian": lambda model, data: ExactIHVP(model, data).state_dict()["full/matrix"],
    "gauss_newton": lambda model, data: ExactIHVP(model, data, curvature="gauss_newton").state_dict()["full/matrix"],
    "cg": lambda model, data: cg(model, data, "hessian"),
    "cg gauss_newton": lambda model, data: cg(model, data, "gauss_newton"),
    "perturbation": lambda model, data: identity(model, data).perturbation(data),
    "scores of single losses": lambda model, data: next(identity(model, data).scores_by_token(data, of="loss"))[1],
}


@pytest.mark.parametrize("asked", ASKED)
def test_fused_attention_is_differentiated_like_plain_products(asked: str) -> None:
    assert_near(answers(F.scaled_dot_product_attention, ASKED[asked]), answers(written_out, ASKED[asked]), 1e-9)
    assert torch.backends.cuda.flash_sdp_enabled(), "only within"
