"""What iterative solvers share: the products they are made of, and how they say what they reached."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ihvp.methods.base import Vectors
from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP
from ihvp.methods.products import CurvatureProducts, check_curvature
from ihvp.model import InfluenceModel

ON_FAILURE = ("warn", "raise", "return")


@dataclass(frozen=True)
class IterationReport:
    """What the solve of one block reached, for D dampings and Q right-hand sides b.

    Attributes:
        iterations: steps, each of them one product with the curvature for all systems at once.
        residuals: (D,Q): ||b - (F + damping I) x|| / ||b||, zero for b = 0.
        converged: (D,Q) bool.
        remark: what else went wrong, or "".
    """

    iterations: int
    residuals: Tensor
    converged: Tensor
    remark: str = ""


class ConvergenceWarning(UserWarning):
    """An iterative method stopped before its tolerance; the message names the residual."""


class ConvergenceError(RuntimeError):
    """An iterative method stopped before its tolerance; the message names the residual."""


class IterativeIHVP(FlatIHVP):
    """An IHVP whose solves are passes over the data.

    Its state is the data: it is fitted again, not saved. A fit linearises every batch at the present parameters and
    keeps that in memory while it takes less than 1 GiB; otherwise each product passes over the loader again.

    Args:
        curvature: "hessian", "gauss_newton" or "fisher".
        on_failure: "warn" issues a ConvergenceWarning and returns the result reached, "raise" raises a
            ConvergenceError, "return" only returns the result; `reports` tells.

    Attributes:
        reports: block name -> IterationReport of the last solve.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None,
        damping: Damping,
        curvature: str,
        on_failure: str,
        block_structure: BlockStructure,
    ) -> None:
        check_curvature(curvature)
        check_on_failure(on_failure)
        self.curvature = curvature
        self.on_failure = on_failure
        self.reports: dict[str, IterationReport] = {}
        self._products: CurvatureProducts | None = None
        super().__init__(model, hessian_loader, damping, block_structure)

    @property
    def is_fitted(self) -> bool:
        return self._products is not None

    def fit(self, loader: Iterable[Any]) -> IterativeIHVP:
        self._products = CurvatureProducts(self.model, loader, self.curvature, self.blocks)
        return self

    @property
    def products(self) -> CurvatureProducts:
        self._check_fitted()
        assert self._products is not None
        return self._products

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        return self.products(block, v)

    def _mean_eigenvalue(self, block: str) -> float:
        return self.products.mean_eigenvalue(block)

    def _solve_several(self, V: Vectors, dampings: list[Damping]) -> Vectors:
        self.reports = {}
        return super()._solve_several(V, dampings)

    def _report(self, block: str, report: IterationReport, tolerance: str, advice: str) -> None:
        """Keep a report, and complain as `on_failure` says."""
        self.reports[block] = report
        if bool(report.converged.all()):
            return
        complain(
            self.on_failure,
            f"block {block!r}: {type(self).__name__} stopped after {report.iterations} iterations with "
            f"{int((~report.converged).sum())} of {report.converged.numel()} systems above {tolerance}: the largest "
            f"relative residual is {float(report.residuals.max()):.3g}{report.remark}; {advice}",
        )

    def state_dict(self) -> dict[str, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be saved: its state is the data itself; fit it again instead"
        )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no state to load: its state is the data itself; fit it")


def check_on_failure(on_failure: str) -> None:
    if on_failure not in ON_FAILURE:
        raise ValueError(f"on_failure must be one of {', '.join(ON_FAILURE)}, got {on_failure!r}")


def check_positive(**values: float | None) -> None:
    """Numbers of which each must be positive, or None."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"{name} must be positive, got {value!r}")


def complain(on_failure: str, message: str) -> None:
    if on_failure == "raise":
        raise ConvergenceError(message)
    if on_failure == "warn":
        warnings.warn(message, ConvergenceWarning, stacklevel=2)
