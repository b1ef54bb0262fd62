"""The one loop with hooks: what reaches the sink."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from capture_cases import N, captured, ignore, labels, mask, x
from ihvp import Batch, InfluenceModel
from ihvp.capture import capture
from nets import F64, assert_near, chain, cross_entropy, gradients, losses, pooled, squared_error, tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# --- nets --------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One layer used three times, with another between: not in the order of the net."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.step, self.side = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.step(x).tanh()
        return self.out(self.step(self.side(self.step(h).tanh())).sin())


class Twins(nn.Module):
    """Two modules with the same Parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Joined(nn.Module):
    """Two arguments that meet, called by keyword inside; an output dict; a branch that does not reach the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        h = self.left(input=left) * scale.unsqueeze(-1)
        self.right(right + 1)
        return {"logits": h + self.right(right).relu()}


def logits_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return cross_entropy(outputs["logits"], targets)


def frozen(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.requires_grad_(False)
    return net


def mean_of_positions(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss an example, from all its positions."""
    return (outputs.flatten(1).mean(1) - targets).square()


def image_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(1, -2), targets)


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "(N,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 4), labels(N))),
    "(N,I) without bias": Case(lambda: chain(4, 5, 3, bias=False), lambda: (x(N, 4), labels(N))),
    "(N,T,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), labels(N, 6))),
    "(N,T,I) without bias": Case(lambda: chain(4, 5, 3, bias=False), lambda: (x(N, 6, 4), labels(N, 6))),
    "(N,T1,T2,I)": Case(lambda: chain(4, 5, 3), lambda: (x(N, 2, 3, 4), labels(N, 6)), image_loss),
    "(N,T1,T2,I) strided": Case(
        lambda: chain(4, 5, 3), lambda: (x(N, 4, 2, 3).permute(0, 2, 3, 1), labels(N, 6)), image_loss
    ),
    "one example": Case(lambda: chain(4, 5, 3), lambda: (x(1, 6, 4), labels(1, 6))),
    "only the layer": Case(lambda: nn.Linear(4, 3), lambda: (x(N, 4), labels(N))),
    "one loss an example of positions": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), x(N)), mean_of_positions),
    "mask": Case(lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6))),
    "mask of numbers": Case(
        lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6).long())
    ),
    "mask of (N,T1,T2,I)": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(N, 2, 3, 4),), targets=labels(N, 6), mask=mask(N, 6)),
        image_loss,
    ),
    "mask of one position": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(4, 1, 4),), targets=labels(4, 1), mask=torch.tensor([[1], [0], [1], [0]])),
    ),
    "weights": Case(
        lambda: chain(4, 5, 3), lambda: Batch(args=(x(N, 4),), targets=labels(N), weights=torch.rand(N, dtype=F64))
    ),
    "weights and mask": Case(
        lambda: chain(4, 5, 3),
        lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6), weights=torch.rand(N, dtype=F64)),
    ),
    "ignored targets": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), torch.where(mask(N, 6), labels(N, 6), -100))),
    "regression": Case(lambda: chain(4, 5, 3), lambda: (x(N, 6, 4), x(N, 6, 3)), squared_error),
    "layer used three times": Case(Recurrent, lambda: (x(N, 4), labels(N))),
    "layer used three times, (N,T,I)": Case(Recurrent, lambda: (x(N, 6, 4), labels(N, 6))),
    "layer used three times, mask": Case(
        Recurrent, lambda: Batch(args=(x(N, 6, 4),), targets=labels(N, 6), mask=mask(N, 6))
    ),
    "modules with the same parameters": Case(Twins, lambda: (x(N, 6, 4), labels(N, 6))),
    "args, kwargs, dicts": Case(
        Joined,
        lambda: Batch(args=(x(N, 4), x(N, 2)), kwargs={"scale": torch.rand(N, dtype=F64)}, targets=labels(N)),
        logits_loss,
    ),
    "inputs as a dict": Case(
        Joined, lambda: ({"left": x(N, 4), "right": x(N, 2), "scale": x(N)}, labels(N)), logits_loss
    ),
    "process_batch": Case(
        lambda: chain(4, 5, 3),
        lambda: {"pixels": x(N, 4), "label": labels(N), "note": "what a loader yields"},
        options={"process_batch": lambda raw: (raw["pixels"], raw["label"])},
    ),
    "process_batch to a Batch": Case(
        lambda: chain(4, 5, 3),
        lambda: [x(N, 6, 4), labels(N, 6), mask(N, 6)],
        options={"process_batch": lambda raw: Batch(args=(raw[0],), targets=raw[1], mask=raw[2])},
    ),
    "frozen parameters": Case(lambda: frozen(chain(4, 5, 3)), lambda: (x(N, 4), labels(N))),
    "first layer frozen": Case(
        lambda: nn.Sequential(frozen(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), lambda: (x(N, 4), labels(N))
    ),
    "train mode": Case(lambda: chain(4, 5, 3, between=nn.Dropout).train(), lambda: (x(N, 4), labels(N))),
    "eval mode": Case(lambda: chain(4, 5, 3, between=nn.Dropout).eval(), lambda: (x(N, 4), labels(N))),
    "in-place ReLU": Case(
        lambda: chain(4, 5, 5, 3, between=lambda: nn.ReLU(inplace=True)), lambda: (x(N, 4), labels(N))
    ),
    "in-place ReLU, (N,T,I)": Case(
        lambda: chain(4, 5, 5, 3, between=lambda: nn.ReLU(inplace=True)), lambda: (x(N, 6, 4), labels(N, 6))
    ),
    "in-place ReLU without bias, (N,T,I)": Case(
        lambda: chain(4, 5, 5, 3, bias=False, between=lambda: nn.ReLU(inplace=True)),
        lambda: (x(N, 6, 4), labels(N, 6)),
    ),
    "from a layer": Case(
        lambda: chain(4, 5, 5, 3), lambda: (x(N, 6, 4), labels(N, 6)), options={"start_layer": 1, "last_layer": 1}
    ),
    "to a layer": Case(lambda: chain(4, 5, 5, 3), lambda: (x(N, 4), labels(N)), options={"last_layer": "2"}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_torch_func(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = InfluenceModel(case.net().double(), case.loss_fn, **case.options)
    batch = model.batch(case.batch())
    torch.manual_seed(1)  # the masks of dropout
    want = gradients(model, batch)
    torch.manual_seed(1)
    got = captured(model, batch)
    assert got.keys() == want.keys()
    for layer, g in got.items():
        assert g.shape == (batch.size, *model.layers[layer].shape)
        assert_near(g, want[layer])


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_caller_may_have_switched_gradients_off(caller: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
    problem = tokens()
    model, batch = problem.model(), problem.train
    want = gradients(model, batch)
    with caller():
        got = captured(model, batch)
    for name in want:
        assert_near(got[name], want[name])


def test_batches_may_be_made_in_inference_mode() -> None:
    """A DataLoader read in inference mode stacks its batches there."""
    net = chain(4, 5, 3).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    inputs, targets = x(N, 4), labels(N)
    want = gradients(model, Batch(args=(inputs,), targets=targets))
    with torch.inference_mode():
        (got,) = [
            captured(model, batch) for _, batch in model.passes(DataLoader(TensorDataset(inputs, targets), N), "")
        ]
    for name in want:
        assert_near(got[name], want[name])


class Wanting(nn.Module):
    """What fine-tuning with checkpoints does to embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_()


def test_gradients_of_inputs_do_not_matter() -> None:
    """Inputs that the caller, or the net itself, wants gradients of."""
    net = chain(4, 5, 3).double()
    inputs, targets = x(N, 4), labels(N)
    want = gradients(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets))
    inputs.requires_grad_()
    got = captured(InfluenceModel(net, cross_entropy), Batch(args=(inputs,), targets=targets))
    inside = captured(
        InfluenceModel(nn.Sequential(Wanting(), *net), cross_entropy), Batch(args=(inputs,), targets=targets)
    )
    assert inputs.grad is None and inputs.requires_grad
    for g in (got, inside):
        assert len(g) == len(want)
        for a, b in zip(sorted(g), sorted(want), strict=True):
            assert_near(g[a], want[b])


def test_a_mask_of_one_position_leaves_out_examples_of_a_plain_net() -> None:
    """(N,1): T is 1 where layers have one position an example."""
    model = InfluenceModel(chain(4, 5, 3).double(), cross_entropy)
    batch = Batch(args=(x(N, 4),), targets=labels(N))
    kept = torch.tensor([1, 0, 1, 1, 0])
    want = gradients(model, batch)
    seen: dict[str, Tensor] = {}
    masked = Batch(args=batch.args, targets=batch.targets, mask=kept.unsqueeze(1))
    capture(model, masked, lambda layer, a, delta, mask: seen.update({layer.name: mask}))
    assert all(mask is not None and torch.equal(mask[:, 0], kept.bool()) for mask in seen.values())
    for name, g in captured(model, masked).items():
        assert_near(g, want[name] * kept.view(-1, 1, 1))
    assert_near(capture(model, masked, ignore), capture(model, batch, ignore) * kept)


class Point(NamedTuple):
    left: Tensor
    right: Tensor


class Containers(nn.Module):
    """A net that asks what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, point: Point, parts: list[Tensor]) -> Tensor:
        assert type(parts) is list
        return self.inner(point.left + point.right) + sum(parts)


def test_containers_arrive_as_they_were() -> None:
    model = InfluenceModel(Containers().double(), lambda outputs, point: squared_error(outputs, point.left))
    point, targets, parts = Point(x(N, 4), x(N, 4)), Point(x(N, 3), x(N, 3)), [x(N, 3), x(N, 3)]
    batch = Batch(args=(point,), kwargs={"parts": parts}, targets=targets)
    want = gradients(model, Batch(args=(point,), kwargs={"parts": parts}, targets=targets))
    assert_near(captured(model, model.batch(batch))["inner"], want["inner"])


def test_losses_come_back() -> None:
    problem = pooled()
    model, batch = problem.model(), problem.train
    got = capture(model, batch, ignore)
    assert_near(got, losses(model, batch, model.net(**batch.kwargs)).detach())
    assert not got.requires_grad


# --- what is refused ---------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Uses one of two layers, as the batch says; a third shields itself from gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.shielded = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        with torch.no_grad():
            shift = self.shielded(x)
        return (self.one if way == 1 else self.two)(x) + shift


@pytest.mark.parametrize(("way", "reached"), [(1, "one"), (2, "two")])
def test_only_the_layers_that_a_batch_reaches_are_handed_over(way: int, reached: str) -> None:
    model = InfluenceModel(Routed().double(), cross_entropy)
    batch = Batch(args=(x(N, 4), way), targets=labels(N))
    got = captured(model, batch)
    assert list(got) == [reached]
    assert_near(got[reached], gradients(model, batch)[reached])


def test_no_layer_reached_is_refused() -> None:
    model = InfluenceModel(Routed(), cross_entropy, layers=["one"])
    with pytest.raises(ValueError, match="no tracked layer reaches the loss; tracked: 'one'"):
        capture(model, Batch(args=(torch.randn(N, 4), 2), targets=labels(N)), ignore)
