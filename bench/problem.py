"""An op at one shape: the call, its answer in float64, and what else computes the same.

The rivals of a problem belong to families. "peer" is the formula as kronfluence 1.0.1 computes it. "torch.mm", "oneDNN"
and "OpenBLAS" are one plain contraction, written once, on each of the products that Python reaches. "einsum" are the
pairwise orders of an einsum, the peer's formula for `gradient_dot` among them. All work on the same tensors, with as
many threads, and allocate their results as the op does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ihvp
import torch
from ihvp import ops
from ihvp.ops._registry import Explanation
from opt_einsum import DynamicProgramming, contract_path
from torch import Tensor

from bench.products import Product, products

Run = Callable[[], Tensor]
F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Rival:
    family: str
    run: Run
    detail: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}, {self.detail}" if self.detail else self.family


@dataclass(frozen=True)
class Problem:
    """A call of an op with its rivals.

    `flops` is the least that a known contraction order needs; `target` what in-place calls add to, zeroed before a
    check.
    """

    op: str
    arguments: dict[str, Any]
    reference: Run
    rivals: tuple[Rival, ...]
    flops: float
    dtype: torch.dtype = F32
    target: Tensor | None = None

    def run(self) -> Tensor:
        result = getattr(ops, self.op)(**self.arguments)
        return torch.cat([x.flatten() for x in result]) if isinstance(result, tuple) else result

    def explain(self) -> Explanation:
        return ihvp.explain(getattr(ops, self.op), **self.arguments)

    def bytes(self, result: Tensor) -> int:
        """Operands read once, a result of this shape written once."""
        tensors = [x for x in self.arguments.values() if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors) + result.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layer:
    """Random tokens of a layer, an orthogonal eigenbasis, and eigenvalues as a trained layer has them."""

    a: Tensor
    delta: Tensor
    U_A: Tensor
    U_G: Tensor
    Lambda: Tensor

    @property
    def damping(self) -> float:
        return 0.1 * float(self.Lambda.mean())

    def double(self) -> Layer:
        return Layer(*(x.double() for x in (self.a, self.delta, self.U_A, self.U_G, self.Lambda)))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(N: int, T: int, O: int, I: int) -> Layer:
    """Lambda is the outer product of two falling spectra, up to the noise of a sample."""
    tokens = (N, T) if T > 1 else (N,)
    spectrum_G, spectrum_A = ((1 + torch.arange(d)).float().pow(-1.0) for d in (O, I))
    noise = (0.05 * normal(O, I, seed=5)).exp()
    return Layer(
        normal(*tokens, I, seed=1),
        normal(*tokens, O, seed=2),
        torch.linalg.qr(normal(I, I, seed=3)).Q,
        torch.linalg.qr(normal(O, O, seed=4)).Q,
        torch.outer(spectrum_G, spectrum_A) * noise,
    )


def tuned(run: Callable[[Product], Tensor], dtype: torch.dtype = F32, detail: str = "") -> tuple[Rival, ...]:
    """The same contraction on every product there is."""
    return tuple(Rival(name, partial(run, mm), detail) for name, mm in products(dtype).items())


def peer_einsum(expression: str, *operands: Tensor) -> Tensor:
    """An einsum by kronfluence's path: the fewest operations, outer products allowed."""
    path = contract_path(expression, *operands, optimize=DynamicProgramming(search_outer=True, minimize="flops"))[0]
    flat = [index for pair in path for index in pair]
    return torch._VF.einsum(expression, operands, path=flat)  # type: ignore[attr-defined]  # torch's stubs lack it


def peer_gradient(a: Tensor, delta: Tensor) -> Tensor:
    return torch.einsum("b...i,b...o->bio", delta, a)


def tokens(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.unsqueeze(1)


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
