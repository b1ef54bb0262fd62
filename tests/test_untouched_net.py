"""Capture leaves the user's net as it was, whatever fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from capture_cases import N, ignore, labels, unchanged, x
from ihvp import Batch, InfluenceModel
from ihvp.capture import capture
from nets import chain, cross_entropy, squared_error
from torch import Tensor, nn


class Counting(nn.Module):
    """A net whose forward pass changes a buffer, in place or by assigning another tensor, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("calls", torch.zeros(()))
        self.assigns = self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        h = self.first(x)
        if self.fails:
            raise KeyError("net")
        return self.last(self.drop(self.norm(h)))


def counting(training: bool) -> Counting:
    net = Counting().double().train(training)
    net.norm.eval()
    net.first.bias.requires_grad_(False)
    net.last.weight.grad = torch.ones_like(net.last.weight)
    net.first.register_forward_hook(lambda module, args, output: None)
    return net


def fails(*args: Any) -> Tensor:
    raise KeyError("here")


FAILURES: dict[str, tuple[bool, Any, Any, type[BaseException] | None]] = {
    "nothing": (False, cross_entropy, ignore, None),
    "the net": (True, cross_entropy, ignore, KeyError),
    "the loss": (False, fails, ignore, KeyError),
    "the sink": (False, cross_entropy, fails, KeyError),
    "a scalar loss": (False, lambda outputs, targets: outputs.sum(), ignore, ValueError),
    "a loss that is not finite": (False, lambda outputs, targets: outputs.sum(1) / 0, ignore, FloatingPointError),
    "a loss of something else": (False, lambda outputs, targets: torch.ones(N), ignore, ValueError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_net_stays_as_it_was_whatever_fails(failure: str) -> None:
    net_fails, loss_fn, sink, error = FAILURES[failure]
    net = counting(training=True)
    net.fails = net_fails
    model = InfluenceModel(net, loss_fn)
    with unchanged(net), contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error))
        capture(model, Batch(args=(x(N, 4),), targets=labels(N)), sink)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("assigns", [True, False], ids=["assigned", "in place"])
def test_buffers_stay_as_they_were(assigns: bool, training: bool) -> None:
    net = counting(training)
    net.assigns, buffers = assigns, dict(net.named_buffers())
    with unchanged(net):
        capture(InfluenceModel(net, cross_entropy), Batch(args=(x(N, 4),), targets=labels(N)), ignore)
    assert all(b is buffers[name] for name, b in net.named_buffers())


def test_no_parameter_collects_a_gradient_and_the_next_training_step_is_as_ever() -> None:
    net = chain(4, 5, 3).double()
    inputs, targets = x(N, 4), labels(N)
    want = torch.autograd.grad(cross_entropy(net(inputs), targets).sum(), list(net.parameters()))
    capture(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets), ignore)
    assert all(p.grad is None for p in net.parameters())
    cross_entropy(net(inputs), targets).sum().backward()
    for p, g in zip(net.parameters(), want, strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)


def test_batch_normalisation_in_training_mode_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    with unchanged(net), pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) is in training mode.*net\.eval\(\)"):
        capture(InfluenceModel(net, cross_entropy), Batch(args=(torch.randn(N, 4),), targets=labels(N)), ignore)


class Overwriting(nn.Module):
    """Changes the input of a layer in place after the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.second(h)
        return y + h.mul_(2)


def test_input_changed_in_place_is_refused_by_name() -> None:
    net = Overwriting()
    with unchanged(net), pytest.raises(RuntimeError, match=r"input of layer 'second' was changed in place"):
        capture(InfluenceModel(net, squared_error), Batch(args=(torch.randn(N, 4),), targets=torch.zeros(N, 4)), ignore)
