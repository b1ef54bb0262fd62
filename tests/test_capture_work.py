"""What capture runs and holds: no product for weight gradients, no tensor longer than needed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_cases import N, captured, ignore, labels, x
from ihvp import Batch, InfluenceModel
from ihvp.capture import capture
from nets import assert_near, chain, cross_entropy, gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


class Products(TorchDispatchMode):
    """Counts matrix products as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "matmul")
        return func(*args, **(kwargs or {}))


class Fork(nn.Module):
    """Two first layers that meet, and two above them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.middle, self.out = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.left(x).tanh() * self.right(x)).tanh())


# One product for each layer's forward pass, one back to the input of each that is above a first tracked one.
PRODUCTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "all of three": (lambda: chain(4, 5, 5, 3), {}, 3 + 2),
    "without bias": (lambda: chain(4, 5, 5, 3, bias=False), {}, 3 + 2),
    "the last": (lambda: chain(4, 5, 5, 3), {"start_layer": -1}, 3 + 0),
    "the second": (lambda: chain(4, 5, 5, 3), {"layers": ["2"]}, 3 + 1),
    "two first layers": (Fork, {}, 4 + 2),
}


@pytest.mark.parametrize("T", [None, 6])
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_weight_gradient_product_is_run(name: str, T: int | None) -> None:
    net, options, expected = PRODUCTS[name]
    shape = (N,) if T is None else (N, T)
    model = InfluenceModel(net(), cross_entropy, **options)
    with Products() as products:
        capture(model, Batch(args=(torch.randn(*shape, 4),), targets=labels(*shape)), ignore)
    assert products.count == expected


def test_each_layer_is_handed_over_once_from_the_top_down() -> None:
    order: list[str] = []
    model = InfluenceModel(chain(4, 5, 5, 3), cross_entropy)
    capture(model, Batch(args=(torch.randn(N, 4),), targets=labels(N)), lambda layer, *_: order.append(layer.name))
    assert order == ["4", "2", "0"]


def test_what_was_handed_over_is_let_go() -> None:
    """When the backward pass reaches a layer, inputs and gradients of those above it are free."""
    model = InfluenceModel(chain(4, 5, 5, 3), cross_entropy)
    alive: dict[str, weakref.ref[Any]] = {}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        assert [name for name, storage in alive.items() if storage() is not None] == []
        alive[f"{layer.name} a"] = weakref.ref(a.untyped_storage())
        alive[f"{layer.name} delta"] = weakref.ref(delta.untyped_storage())

    capture(model, Batch(args=(torch.randn(N, 4),), targets=labels(N)), sink)
    assert len(alive) == 6


class Checkpointed(nn.Module):
    """Recomputes the parts named in the backward pass; `counts` are the calls of each part."""

    def __init__(self, parts: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(chain(4, 4, 4) for _ in range(3))
        self.recomputed = parts
        self.counts: Counter[int] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):

            def run(x: Tensor, i: int = i, part: nn.Module = part) -> Tensor:
                self.counts[i] += 1
                return part(x).tanh()

            x = checkpoint(run, x, use_reentrant=False) if i in self.recomputed else run(x)
        return x


@pytest.mark.parametrize("parts", [(1,), (2,), (1, 2), (0,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"start_layer": "parts.1.0"}], ids=["all", "some"])
def test_activation_checkpoints_change_nothing(parts: tuple[int, ...], options: dict[str, Any]) -> None:
    batch = Batch(args=(x(N, 6, 4),), targets=labels(N, 6))
    want = gradients(InfluenceModel(Checkpointed(()).double(), cross_entropy, **options), batch)
    net = Checkpointed(parts).double()
    got = captured(InfluenceModel(net, cross_entropy, **options), batch)
    assert got.keys() == want.keys()
    for name in want:
        assert_near(got[name], want[name])
    first = 1 if options else 0  # what lies before the first tracked layer is not part of the graph
    assert net.counts == {i: 2 if i in parts and i >= first else 1 for i in range(3)}
