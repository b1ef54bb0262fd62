"""Numbers that are not finite name the layer and the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ihvp import ExactIHVP, FirstOrderInfluenceCalculator
from ihvp.batch import FiniteChecks, all_finite
from method_cases import FITTED
from nets import METHODS, cross_entropy
from sound_problem import N, check, model, x, y
from torch import Tensor, nn


class Clamped(nn.Module):
    """Finite outputs whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).nan_to_num(0, 0, 0)


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    """Finite, with a gradient that is not where all targets are 2: of the square root at 0."""
    losses = cross_entropy(outputs, targets)
    return losses + (outputs - outputs.detach()).sum(1).abs().sqrt() if bool((targets == 2).all()) else losses


@pytest.fixture(params=["at once", "together"])
def answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU."""
    if request.param == "together":
        monkeypatch.setattr(FiniteChecks, "_answers_at_once", staticmethod(lambda x: False))


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("method", FITTED)
def test_a_factor_that_is_not_finite_names_the_layer_and_the_batch(method: str) -> None:
    bad = torch.full((N, 4), torch.inf)
    where = (
        r"layer 'inner', batch 1: .* is not finite"
        if METHODS[method].cls is not ExactIHVP or method == "fisher matrix"
        else r"batch 1 is not finite"
    )
    check(lambda: METHODS[method](model(Clamped()), [(x, y), (bad, y)]), FloatingPointError, where)
    where = where.replace("inner", "2")
    few = (x, y.clamp_max(1))
    check(lambda: METHODS[method](model(loss_fn=steep), [few, (x, torch.full((N,), 2))]), FloatingPointError, where)


@pytest.mark.parametrize(
    ("method", "normalize"),
    [
        ("identity", False),
        ("kfac pi", "theta"),
        ("ekfac", False),
        ("ekfac", "loss"),
        ("fisher", False),
        ("fisher", "theta"),
    ],
)
@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("how", ["query", "train", "top_k", "self", "values", "group", "compute_ihvp", "compute_hvp"])
def test_a_gradient_that_is_not_finite_names_the_layer_and_the_batch(
    how: str, method: str, normalize: bool | str
) -> None:
    """Never NaN, and never the zero of an example without gradient."""
    steep_model = model(loss_fn=steep)
    good, bad = (x, y.clamp_max(1)), (x, torch.full((N,), 2))
    curvature = METHODS[method](steep_model, [good], damping=0.1)
    own = FirstOrderInfluenceCalculator(steep_model, [good], curvature, normalize=normalize)
    calls: dict[str, Callable[[], Any]] = {
        "query": lambda: own.scores([good, bad]),
        "train": lambda: own.scores([good], [good, bad]),
        "top_k": lambda: own.top_k([good], [good, bad], k=1),
        "self": lambda: own.self_scores([good, bad]),
        "values": lambda: list(own.compute_influence_values([good, bad])),
        "group": lambda: list(own.estimate_influence_values_group([[good, bad]])),
        "compute_ihvp": lambda: curvature.compute_ihvp([good, bad]),
        "compute_hvp": lambda: curvature.compute_hvp([good, bad]),
    }
    check(calls[how], FloatingPointError, r"layer '[02]', batch 1: .* is not finite")


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), None])
def test_a_sum_that_overflows_is_not_a_number_that_is_not_finite(bad: float | None) -> None:
    x = torch.full((5, 3), torch.finfo(torch.float32).max, requires_grad=True)
    if bad is not None:
        x.data[4, 1] = bad
    assert all_finite(x) == (bad is None)


@pytest.mark.usefixtures("answers")
def test_what_is_masked_need_not_be_finite() -> None:
    x, mask = torch.tensor([[[1.0], [torch.nan]], [[torch.inf], [2.0]]]), torch.tensor([[True, False], [False, True]])
    checks = FiniteChecks()
    checks.add(x, "masked", mask)
    checks.add(x[:0], "empty")
    checks.finish()
    with pytest.raises(FloatingPointError, match="second"):
        checks.add(x[:, :1], "second", mask[:, 1:])
        checks.add(x, "third")
        checks.finish()
