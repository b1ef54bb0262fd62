"""Boundary-based influence: closed forms for linear nets, DeepFool's loop for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import Batch, InfluenceModel, Order, SampleBoundaryCalculator, WeightsBoundaryCalculator
from nets import F64, PROBLEMS, assert_near, batches, chain, cross_entropy, plain
from torch import Tensor, nn


def linear() -> tuple[nn.Linear, InfluenceModel, Batch]:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    batch = Batch(args=(torch.randn(20, 4, dtype=F64),), targets=torch.randint(3, (20,)))
    return net, InfluenceModel(net, cross_entropy, progress=False), batch


def test_a_linear_net_has_its_margins() -> None:
    """By sample min_k |f_k - f_c| / ||w_k - w_c||; by weights min_k |f_k - f_c| / (sqrt(2) ||(x, 1)||)."""
    net, model, batch = linear()
    x = batch.args[0]
    logits = net(x).detach()
    c = logits.argmax(1)
    sample, weights = torch.full((2, 20), torch.inf, dtype=F64)
    for n in range(20):
        for k in range(3):
            if k != c[n]:
                gap = logits[n, c[n]] - logits[n, k]
                sample[n] = min(sample[n], gap / (net.weight[c[n]] - net.weight[k]).norm().detach())
                weights[n] = min(weights[n], gap / (2 * (x[n].square().sum() + 1)).sqrt())
    # The boundary counts as reached when the logits differ by eps.
    assert_near(SampleBoundaryCalculator(model, [batch], eps=1e-12).self_scores(), -sample, 1e-9)
    assert_near(WeightsBoundaryCalculator(model, [batch], eps=1e-12).self_scores(), -weights, 1e-9)
    values, indices = SampleBoundaryCalculator(model).compute_top_k_from_training_dataset([batch], 3, Order.DESCENDING)
    assert torch.equal(indices, (-sample).topk(3).indices)
    assert_near(values, (-sample).topk(3).values, 1e-5)


def deepfool(net: nn.Module, variables: list[Tensor], x: Tensor, eps: float) -> Tensor:
    """The loop of the paper on one example; `variables` are moved, and put back at the end."""
    start = [v.detach().clone() for v in variables]
    first = int(net(x).argmax())
    for _ in range(100):
        logits = net(x)[0]
        others = [k for k in range(len(logits)) if k != first]
        if max(float(logits.detach()[k] - logits.detach()[first]) for k in others) >= -eps:
            break
        steps = []
        for k in others:
            slope = torch.autograd.grad(logits[k] - logits[first], variables, retain_graph=True)
            norm = torch.cat([s.flatten() for s in slope]).norm()
            gap = (logits[k] - logits[first]).detach().abs()
            steps.append((gap / norm, [gap / norm**2 * s for s in slope]))
        _, step = min(steps, key=lambda one: float(one[0]))
        for v, s in zip(variables, step, strict=True):
            v.data += s
    length = torch.cat([(v.detach() - s).flatten() for v, s in zip(variables, start, strict=True)]).norm()
    for v, s in zip(variables, start, strict=True):
        v.data.copy_(s)
    return length


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_against_the_papers_loop(chunk: int) -> None:
    data = plain(11)
    model, eps = data.model(), 1e-9
    x = data.train.args[0]
    weights = list(data.net.parameters())
    by_sample = torch.stack([deepfool(data.net, [own := one[None].clone().requires_grad_()], own, eps) for one in x])
    by_weights = torch.stack([deepfool(data.net, weights, one[None], eps) for one in x])
    # Where steps end depends on the last one's rounding, by eps at most.
    train = batches(data.train, 4)
    assert_near(SampleBoundaryCalculator(model, train, eps=eps, chunk=chunk).self_scores(), -by_sample, 1e-7)
    assert_near(WeightsBoundaryCalculator(model, train, eps=eps, chunk=chunk).self_scores(), -by_weights, 1e-7)


def test_weights_of_the_tracked_layers_only() -> None:
    data = plain(7)
    weights = [data.net[2].weight]
    want = torch.stack([deepfool(data.net, weights, one[None], 1e-9) for one in data.train.args[0]])
    calculator = WeightsBoundaryCalculator(data.model(start_layer=-1), [data.train], eps=1e-9)
    assert_near(calculator.self_scores(), -want, 1e-7)


def test_keyword_inputs_masks_and_weights() -> None:
    """A net of keyword arguments, some of them not real, in float32 too."""
    data = PROBLEMS["pooled"](9)
    for kind in (SampleBoundaryCalculator, WeightsBoundaryCalculator):
        whole = kind(data.model(), [data.train]).self_scores()
        assert (whole < 0).all() and whole.isfinite().all()
        assert_near(kind(data.model(), batches(data.train, 2)).self_scores(), whole, 1e-7)


def test_an_example_without_a_boundary() -> None:
    torch.manual_seed(0)
    net = chain(4, 3, 2)
    with torch.no_grad():
        net[2].weight.zero_()
    batch = Batch(args=(torch.randn(5, 4),), targets=torch.zeros(5, dtype=torch.long))
    model = InfluenceModel(net, cross_entropy, progress=False)
    assert (SampleBoundaryCalculator(model, [batch]).self_scores() == -torch.inf).all()
    data = plain(29)
    few = SampleBoundaryCalculator(data.model(), [data.train], steps=1).self_scores()
    assert few.isinf().any() and few.isfinite().any()


@pytest.mark.parametrize("kind", [SampleBoundaryCalculator, WeightsBoundaryCalculator])
def test_the_net_is_left_as_it_was(kind: Any) -> None:
    data = plain(5)
    before = {key: x.clone() for key, x in data.net.state_dict().items()}
    with torch.inference_mode():
        kind(data.model(), [data.train]).self_scores()
    assert all(torch.equal(x, before[key]) for key, x in data.net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in data.net.parameters())
    assert kind(data.model(), [data.train, Batch(args=(torch.zeros(0, 4, dtype=F64),), targets=torch.zeros(0))])


@pytest.mark.parametrize("kind", [SampleBoundaryCalculator, WeightsBoundaryCalculator])
def test_wrong_input(kind: Any) -> None:
    _, model, batch = linear()
    for name in ("steps", "chunk"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
            kind(model, **{name: 0})
    with pytest.raises(ValueError, match="eps must not be negative"):
        kind(model, eps=-1.0)
    with pytest.raises(ValueError, match="no training data"):
        kind(model).self_scores()
    single = InfluenceModel(nn.Linear(4, 1).double(), cross_entropy, progress=False)
    with pytest.raises(ValueError, match=r"must return logits \(N,C\) of 2 classes or more, got a tensor \(1, 1\)"):
        kind(single, [batch]).self_scores()


def test_integer_inputs() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3))
    model = InfluenceModel(net, cross_entropy, layers=["2"], progress=False)
    train = [(torch.randint(7, (5, 2)), torch.randint(3, (5,)))]
    with pytest.raises(TypeError, match=r"args\[0\] must be a floating-point tensor"):
        SampleBoundaryCalculator(model, train).self_scores()
    assert (WeightsBoundaryCalculator(model, train).self_scores() < 0).all()
