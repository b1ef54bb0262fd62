"""What the tests of capture share: batches, sinks, and a look at the net before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from ihvp import Batch, InfluenceModel
from ihvp.capture import capture
from nets import F64, Vectors
from torch import Tensor, nn

N = 5


def captured(model: InfluenceModel, batch: Batch) -> Vectors:
    """Per-example gradients from what the sink is handed, each layer once."""
    g: Vectors = {}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        assert layer.name not in g
        assert a.shape[:2] == delta.shape[:2] and not a.requires_grad and not delta.requires_grad
        if mask is not None:
            assert mask.shape == a.shape[:2] and mask.dtype == torch.bool
            a, delta = (x.masked_fill(~mask.unsqueeze(-1), 0) for x in (a, delta))
        if layer.bias:
            real = torch.ones(a.shape[:2]) if mask is None else mask
            a = torch.cat([a, real.to(a.dtype).unsqueeze(-1)], dim=-1)
        g[layer.name] = torch.einsum("nto,nti->noi", delta, a)

    capture(model, batch, sink)
    return g


def ignore(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
    pass


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def labels(*shape: int) -> Tensor:
    return torch.randint(3, shape)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.4


HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def snapshot(net: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, p in net.named_parameters():
        state[f"{name} requires_grad"], state[f"{name} grad"] = p.requires_grad, p.grad
        state[name] = p.detach().clone()
    for name, b in net.named_buffers():
        state[name] = b.clone()
    for name, module in net.named_modules():
        state[f"{name} training"] = module.training
        state[f"{name} hooks"] = [list(getattr(module, hooks)) for hooks in HOOKS]
        state[f"{name} forward"] = vars(module).get("forward")
    return state


@contextlib.contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    before = snapshot(net)
    yield
    after = snapshot(net)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"{key}: {value} became {after[key]}"
