"""Scores of single tokens, by the position that a layer reads and by the term of the loss, against derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import EKFACIHVP, Batch, FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel
from ihvp.calculators import token_losses
from nets import (
    F64,
    METHODS,
    Problem,
    assert_near,
    batches,
    cross_entropy,
    dense_scores,
    flat,
    gradients,
    plain,
    pooled,
)
from torch import Tensor, nn

DAMPING = 0.3


class Causal(nn.Module):
    """Two layers of every position with the mean over those before in between: what a token brings to later losses is
    not its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh().cumsum(1)
        return self.head(h / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1))


def causal(N: int = 11, masked: bool = True) -> Problem:
    torch.manual_seed(5)

    def data(N: int, T: int) -> Batch:
        mask = torch.arange(T) < torch.randint(1, T + 1, (N, 1))
        x, targets = torch.randn(N, T, 5, dtype=F64), torch.randint(3, (N, T))
        weights = torch.rand(N, dtype=F64) + 0.5
        return Batch(args=(x,), targets=targets, mask=mask if masked else None, weights=weights)

    return Problem(Causal().double(), cross_entropy, data(N, 4), (data(2, 5), data(3, 1), data(2, 3)))


def terms(batch: Batch, outputs: Tensor) -> Tensor:
    """(N,T): weighted, masked."""
    own = cross_entropy(outputs, batch.targets) * batch.weights.unsqueeze(1)
    return own if batch.mask is None else torch.where(batch.mask, own, 0)


def by_position(model: InfluenceModel, batch: Batch) -> Tensor:
    """(N,T,p): the gradient with respect to a copy of the weights that serves one position alone."""
    T = batch.targets.shape[1]
    own = {name: p.detach() for name, p in model.net.named_parameters()}

    def losses(copies: dict[str, Tensor]) -> Tensor:
        h = torch.einsum("nti,toi->nto", batch.args[0], copies["embed.weight"]) + copies["embed.bias"]
        h = h.tanh().cumsum(1) / torch.arange(1, T + 1, dtype=h.dtype).unsqueeze(1)
        return terms(batch, torch.einsum("nti,toi->nto", h, copies["head.weight"])).sum(1)

    g = torch.func.jacrev(losses)({name: p.expand(T, *p.shape) for name, p in own.items()})
    embed = torch.cat([g["embed.weight"], g["embed.bias"].unsqueeze(3)], dim=3)
    return torch.cat([embed.flatten(2), g["head.weight"].flatten(2)], dim=2)


def by_loss(model: InfluenceModel, batch: Batch) -> Tensor:
    """(N,T,p): the gradient of each term."""
    own = {name: p.detach() for name, p in model.net.named_parameters()}
    g = torch.func.jacrev(lambda p: terms(batch, torch.func.functional_call(model.net, p, batch.args)))(own)
    embed = torch.cat([g["embed.weight"], g["embed.bias"].unsqueeze(-1)], dim=-1)
    return torch.cat([embed.flatten(2), g["head.weight"].flatten(2)], dim=2)


PARTS = {"position": by_position, "loss": by_loss}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("of", PARTS)
@pytest.mark.parametrize("method", METHODS)
def test_scores_by_token(method: str, of: str, masked: bool) -> None:
    data = causal(masked=masked)
    model, train = data.model(), batches(data.train, 4)
    calculator = FirstOrderInfluenceCalculator(model, train, METHODS[method](model, train, damping=DAMPING))
    damped = METHODS[method].damped(model, data.train, DAMPING)
    queries = torch.cat([flat(gradients(model, batch)) for batch in data.tests])
    g = PARTS[of](model, data.train)
    want = dense_scores(damped, queries, g.flatten(0, 1)).view(len(queries), *g.shape[:2])
    found = list(calculator.scores_by_token(data.tests, of=of))
    assert [batch for batch, _ in found] == train
    got = torch.cat([scores for _, scores in found], dim=1)
    assert_near(got, want)
    assert_near(got.sum(2), calculator.scores(data.tests))
    if masked:
        assert not got[:, ~data.train.mask].any()


@pytest.mark.parametrize("of", PARTS)
@pytest.mark.parametrize("normalize", ["theta", "loss"])
def test_signs_and_norms_are_those_of_the_scores(normalize: str, of: str) -> None:
    data = causal()
    model, train = data.model(), batches(data.train, 4)
    curvature = EKFACIHVP(model, train, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature, normalize, "loss_change")
    got = torch.cat([scores for _, scores in calculator.scores_by_token(data.tests, of=of)], dim=1)
    assert_near(got.sum(2), calculator.scores(data.tests))


@pytest.mark.parametrize("method", METHODS)
def test_one_position_is_the_whole_score(method: str) -> None:
    data = plain(60)
    model, train = data.model(), batches(data.train, 30)
    calculator = FirstOrderInfluenceCalculator(model, train, METHODS[method](model, train, damping=DAMPING))
    got = torch.cat([scores for _, scores in calculator.scores_by_token(data.tests)], dim=1)
    assert_near(got, calculator.scores(data.tests).unsqueeze(2))


@pytest.mark.parametrize("of", PARTS)
def test_many_small_layers_and_float32(of: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(9)))
    data = Batch(args=(torch.randn(7, 3, 6),), targets=torch.randint(6, (7, 3)))
    model = InfluenceModel(net, cross_entropy, progress=False)
    calculator = FirstOrderInfluenceCalculator(model, [data], EKFACIHVP(model, [data], damping=DAMPING))
    [(_, got)] = calculator.scores_by_token([data], of=of)
    assert got.shape == (7, 7, 3) and got.dtype == torch.float32
    assert_near(got.sum(2), calculator.scores([data]).double())


def test_batches_of_several_lengths_and_none() -> None:
    data = causal()
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, None, IdentityIHVP(model))
    none = Batch(args=(torch.zeros(0, 3, 5, dtype=F64),), targets=torch.zeros(0, 3, dtype=torch.long))
    for of in PARTS:
        shapes = [tuple(x.shape) for _, x in calculator.scores_by_token(data.tests, [*data.tests, none], of=of)]
        assert shapes == [(7, 2, 5), (7, 3, 1), (7, 2, 3), (7, 0, 3)]
        assert [x.shape[0] for _, x in calculator.scores_by_token([none], data.tests, of=of)] == [0, 0, 0]


def test_more_queries_than_are_pushed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of low rank and whole: no more of them are dense at a time."""
    data = causal()
    model = data.model()
    for rank in (None, 1):
        calculator = FirstOrderInfluenceCalculator(model, None, IdentityIHVP(model), query_rank=rank)
        (_, want), *_ = calculator.scores_by_token(data.tests, [data.train], of="loss")
        with monkeypatch.context() as patch:
            patch.setattr(token_losses, "CHUNK", 3)
            (_, got), *_ = calculator.scores_by_token(data.tests, [data.train], of="loss")
        assert_near(got, want)


# --- errors ------------------------------------------------------------------------------------------------------


def scored(data: Problem, **options: Any) -> list[Any]:
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(model, [data.train], IdentityIHVP(model))
    return list(calculator.scores_by_token(data.tests, **options))


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match="of must be one of position, loss, got 'word'"):
        scored(causal(), of="word")
    with pytest.raises(ValueError, match=r"loss_fn that returns \(N,T\), got \(29,\)"):
        scored(plain(), of="loss")
    with pytest.raises(ValueError, match="same positions, got 1 in 'head' and 6 in 'mix'"):
        scored(pooled())


def test_a_score_that_is_not_finite_names_the_batch() -> None:
    data = causal()
    model = data.model()
    calculator = FirstOrderInfluenceCalculator(
        model, [data.train], IdentityIHVP(model), measurement=lambda outputs, targets: outputs.sum(2) * 1e300
    )
    data.train.args[0].mul_(1e20)
    with pytest.raises(FloatingPointError, match="batch 0"):
        list(calculator.scores_by_token(data.tests, of="loss"))


@pytest.mark.parametrize("of", PARTS)
def test_the_net_is_untouched(of: str) -> None:
    data = causal()
    before = {name: p.clone() for name, p in data.net.named_parameters()}
    scored(data, of=of)
    for name, p in data.net.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad and p.grad is None
    assert not any(module._forward_hooks for module in data.net.modules())
