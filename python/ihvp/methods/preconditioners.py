"""Preconditioners for conjugate gradients that are fitted by products with the curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ihvp.methods.iterative import check_positive
from ihvp.methods.nystroem import nystroem_sketch
from ihvp.methods.products import Product
from ihvp.model import InfluenceModel

Preconditioning = Callable[[Tensor, float], Tensor]
"""(v (Q,p), damping) -> M^-1 v, M near F + damping I up to a factor."""


class Preconditioner(ABC):
    """How to make a preconditioning of a block with p parameters."""

    @abstractmethod
    def fit(self, product: Product, p: int, model: InfluenceModel) -> Preconditioning:
        """From products with F, (Q,p) -> (Q,p) in float64, a function of (v (Q,p), damping): M^-1 v."""


@dataclass(frozen=True)
class JacobiPreconditioner(Preconditioner):
    """The diagonal of F + damping I, by Hutchinson's estimate: the mean of s * (F s) over random signs s.

    Args:
        samples: random vectors; from p on the diagonal is exact.

    Source: Bekas, Kokiopoulou and Saad 2007 (10.1016/j.apnum.2007.01.003), section 2.
    """

    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(samples=self.samples)

    def fit(self, product: Product, p: int, model: InfluenceModel) -> Preconditioning:
        if self.samples >= p:
            signs = torch.eye(p, dtype=torch.float64)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            signs = torch.randint(2, (self.samples, p), generator=generator).double() * 2 - 1
        signs = signs.to(model.device)
        diagonal = ((signs * product(signs)).sum(0) / signs.square().sum(0)).abs()
        floor = 1e-3 * float(diagonal.mean()) or 1.0  # an estimate may come out as zero

        def solve(v: Tensor, damping: float) -> Tensor:
            return v / (diagonal.clamp_min(floor) + damping)

        return solve


@dataclass(frozen=True)
class NystroemPreconditioner(Preconditioner):
    """F + damping I on the range of a Nystroem sketch F ~ U diag(Lambda) U^T, a multiple of the identity beside it.

    M^-1 = (Lambda_r + damping) U (diag(Lambda) + damping I)^-1 U^T + I - U U^T, Lambda_r the smallest of Lambda.

    Args:
        rank: columns of the sketch.

    Source: Frangella, Tropp and Udell 2023 (arXiv:2110.02820), eq. 1.3 and algorithm 2.1.
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)

    def fit(self, product: Product, p: int, model: InfluenceModel) -> Preconditioning:
        U, values = nystroem_sketch(product, p, self.rank, self.seed, model)
        positive = values > 0
        U, values = U[:, positive], values[positive]

        def solve(v: Tensor, damping: float) -> Tensor:
            if len(values) == 0:
                return v
            inside = v @ U
            return v + (inside * ((values.min() + damping) / (values + damping) - 1)) @ U.T

        return solve
