"""The Hessian, Gauss-Newton or Fisher matrix itself, solved directly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import all_finite
from ihvp.methods.base import batches, read_state
from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP, positions
from ihvp.methods.matrices import SUMS
from ihvp.methods.products import Parameters, check_curvature
from ihvp.model import InfluenceModel

SEVERAL = 16  # dampings from which on an eigendecomposition costs less than a factorisation for each
NARROW = 1e-4  # smallest by largest eigenvalue above which a float32 factor is refined instead of a float64 one
REFINEMENTS = 10  # each brings at least two digits there
REFINED = {torch.float32: 1e-12, torch.float64: 1e-14}  # the residual over ||F|| ||x|| to reach, by the model's dtype
TILE = 1024


class ExactIHVP(FlatIHVP):
    """The mean Hessian, Gauss-Newton matrix J^T H_outputs J or empirical Fisher matrix. Passes over data: one.

    The matrix of each block (p_b,p_b) is summed in float64 and factorised: by Cholesky where it is positive definite,
    by LU else; a Hessian may have negative eigenvalues, and the system is solved as it stands. A well-conditioned
    matrix is factorised in float32, and its solutions are refined to float64. For 16 dampings at once and for the
    pseudo-inverse it is diagonalised instead.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue; or one of them for each block.
        curvature: "hessian", "gauss_newton" (which needs a net that returns one tensor) or "fisher".
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.
        rcond: None refuses a singular system. A number takes the pseudo-inverse, in which eigenvalues of magnitude up
            to rcond times the largest count as infinite.
        train_hessian: a (p,p) matrix to take instead of fitting, its parameters in the order of the layers, each
            (O,I') row by row.

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 2; Martens 2020 (arXiv:1412.1193), section 8 for Gauss-Newton;
    Higham 2002 (10.1137/1.9780898718027), section 12.1 for the refinement.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 0.0,
        curvature: str = "hessian",
        *,
        block_structure: BlockStructure = "full",
        rcond: float | None = None,
        train_hessian: Tensor | None = None,
    ) -> None:
        p = model.nb_params if isinstance(model, InfluenceModel) else 0
        if train_hessian is not None and tuple(train_hessian.shape) != (p, p):
            raise ValueError(f"train_hessian (p,p) must be {(p, p)}, got {tuple(train_hessian.shape)}")
        check_curvature(curvature)
        if rcond is not None and not 0 <= rcond < 1:
            raise ValueError(f"rcond must be in [0, 1), got {rcond}")
        if train_hessian is not None and hessian_loader is not None:
            raise ValueError("give hessian_loader or train_hessian, not both")
        self.curvature = curvature
        self.rcond = rcond
        self._matrices: dict[str, Tensor] = {}
        self._eigen: dict[str, tuple[Tensor, Tensor]] = {}
        self._factors: dict[tuple[str, float], _Factor] = {}
        super().__init__(model, hessian_loader, damping, block_structure)
        if train_hessian is not None:
            at = {block: positions(model, own).to(train_hessian.device) for block, own in self.blocks.items()}
            self.load_state_dict({f"{block}/matrix": train_hessian[i][:, i] for block, i in at.items()})

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"curvature": self.curvature, "rcond": self.rcond}

    @property
    def is_fitted(self) -> bool:
        return bool(self._matrices)

    def fit(self, loader: Iterable[Any]) -> ExactIHVP:
        model = self.model
        totals: dict[str, Tensor] = {}
        with torch.inference_mode(False):
            for block in self.blocks:
                p = self._block_size(block)
                totals[block] = torch.zeros(p, p, dtype=torch.float64, device=model.device)
        parameters = {block: Parameters(model, own) for block, own in self.blocks.items()}
        examples = 0
        with SUMS[self.curvature](totals, model, parameters) as add:
            for index, batch in batches(model, loader, self.curvature):
                with torch.inference_mode(False):
                    add(batch.outside_inference(), index)
                for block, total in totals.items():
                    if not math.isfinite(float(total.diagonal().sum())):
                        raise FloatingPointError(
                            f"block {block!r}: the {self.curvature} of batch {index} is not finite"
                        )
                examples += batch.size
        self._take(totals, 1 / examples)
        return self

    def _take(self, matrices: dict[str, Tensor], scale: float) -> None:
        """Own the float64 matrices, made symmetric and multiplied by `scale` in place."""
        for block, M in matrices.items():
            if not math.isfinite(float(_symmetrise_(M, scale).sum())):
                raise FloatingPointError(f"block {block!r}: the {self.curvature} is not finite")
        self._matrices = matrices
        self._eigen, self._factors = {}, {}

    def _mean_eigenvalue(self, block: str) -> float:
        return float(self._matrices[block].diagonal().mean())

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        return v @ self._matrices[block]

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        if self.rcond is not None or len(dampings) >= SEVERAL or block in self._eigen:
            return self._solve_by_eigenvalues(block, v, dampings)
        return torch.stack([self._solve_by_factor(block, v, damping) for damping in dampings])

    def _solve_by_factor(self, block: str, v: Tensor, damping: float) -> Tensor:
        """Rows of v by the inverse. A float32 factor's solution is refined to an error of at most REFINED / NARROW."""
        factor = self._factor(block, damping)
        x = factor.solve(v)
        if factor.LU.dtype == torch.float64:
            return x
        matrix, refined = self._matrices[block], REFINED[self.model.dtype]
        for _ in range(REFINEMENTS):
            residuals = v - x @ matrix - damping * x
            if bool((residuals.norm(dim=1) <= refined * factor.largest * x.norm(dim=1)).all()):
                return x
            x = x + factor.solve(residuals)
        self._factors[block, damping] = self._factorised(block, damping, torch.float64)
        return self._solve_by_factor(block, v, damping)

    def _solve_by_eigenvalues(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        if block not in self._eigen:
            self._eigen[block] = torch.linalg.eigh(self._matrices[block])
        values, vectors = self._eigen[block]
        rotated = v @ vectors
        solutions = []
        for damping in dampings:
            shifted = values + damping
            if self.rcond is None:
                self._check_regular(block, damping, float(shifted.abs().min()), float(shifted.abs().max()))
            kept = shifted.abs() > (0.0 if self.rcond is None else self.rcond) * float(shifted.abs().max())
            inverse = torch.where(kept, 1 / torch.where(kept, shifted, 1.0), 0.0)
            solutions.append((rotated * inverse) @ vectors.T)
        return torch.stack(solutions)

    def _factor(self, block: str, damping: float) -> _Factor:
        key = (block, damping)
        if key not in self._factors:
            factor = self._factorised(block, damping, torch.float32)
            if not factor.smallest > NARROW * factor.largest:
                factor = self._factorised(block, damping, torch.float64)
                self._check_regular(block, damping, factor.smallest, factor.largest)
            if len(self._factors) >= 4 * len(self.blocks):  # of a few dampings at a time
                self._factors.clear()
            self._factors[key] = factor
        return self._factors[key]

    def _factorised(self, block: str, damping: float, dtype: torch.dtype) -> _Factor:
        matrix = self._matrices[block]
        steps = 5 if dtype == torch.float64 else 2  # a float32 factor proves itself by its refinements
        largest = _spectral_norm(lambda x: x @ matrix + damping * x, matrix, steps)
        scale = largest if math.isfinite(largest) and largest > 0 else 1.0  # which float32 may not be able to hold
        scaled = torch.div(matrix, scale, out=torch.empty_like(matrix, dtype=dtype))
        scaled.diagonal().add_(damping / scale)
        LU, info = torch.linalg.cholesky_ex(scaled)
        pivots = None
        if int(info) != 0:
            LU, pivots, _ = torch.linalg.lu_factor_ex(scaled)
        factor = _Factor(LU, pivots, scale, largest, 0.0)
        smallest = 1 / max(_spectral_norm(factor.solve, matrix, steps), torch.finfo(torch.float64).tiny)
        return replace(factor, smallest=smallest)

    def _rounding(self, block: str, damping: float) -> float:
        """Of the largest eigenvalue: undamped, zero ones come out as large as the derivatives' rounding errors."""
        eps: float = torch.finfo(self.model.dtype if damping == 0 else torch.float64).eps
        return eps * math.sqrt(self._block_size(block))

    def _check_regular(self, block: str, damping: float, smallest: float, largest: float) -> None:
        if not smallest > self._rounding(block, damping) * largest:
            raise torch.linalg.LinAlgError(
                f"block {block!r}: the {self.curvature} with damping {damping:.3g} is singular: its smallest "
                f"eigenvalue is {smallest:.3g} in magnitude, its largest {largest:.3g}; a larger damping helps, or "
                "rcond for the pseudo-inverse"
            )

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        return {f"{block}/matrix": matrix for block, matrix in self._matrices.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shapes = {f"{block}/matrix": (self._block_size(block),) * 2 for block in self.blocks}
        own = read_state(state, shapes, "ExactIHVP")
        device = self.model.device
        self._take({block: own[f"{block}/matrix"].to(device, torch.float64) for block in self.blocks}, 1.0)


@dataclass(frozen=True)
class _Factor:
    """A factorised symmetric matrix divided by `scale`: Cholesky's L, or LU with its pivots, in float32 or float64.

    `largest` and `smallest` are the magnitudes of the matrix's eigenvalues.
    """

    LU: Tensor
    pivots: Tensor | None
    scale: float
    largest: float
    smallest: float

    def solve(self, v: Tensor) -> Tensor:
        """Rows of v (float64) by the inverse, each scaled so that float32 holds it."""
        norms = v.norm(dim=1, keepdim=True)
        norms = torch.where(norms == 0, 1.0, norms)
        b = (v / norms).to(self.LU.dtype).T
        if self.pivots is None:
            x = torch.cholesky_solve(b, self.LU).T
        else:
            x = torch.linalg.lu_solve(self.LU, self.pivots, b).T
        return x.double() * (norms / self.scale)


def _symmetrise_(M: Tensor, scale: float) -> Tensor:
    """M <- scale (M + M^T) / 2, tile by tile: no second matrix of that size."""
    for i in range(0, len(M), TILE):
        for j in range(0, i + TILE, TILE):
            lower, upper = M[i : i + TILE, j : j + TILE], M[j : j + TILE, i : i + TILE]
            mean = lower.T.add(upper).mul_(scale / 2)
            upper.copy_(mean)
            lower.copy_(mean.T)
    return M


def _spectral_norm(apply: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> float:
    """||M|| of a symmetric M from rows x -> x M, by subspace iteration: after five steps at most a few times too small.

    Infinite where the result is not finite, as that of a solve with an exact zero on the diagonal.
    """
    rows = torch.randn(4, len(like), dtype=like.dtype, generator=torch.Generator().manual_seed(0)).to(like.device)
    norm = 0.0
    for _ in range(steps):
        basis = torch.linalg.qr(rows.T).Q
        rows = apply(basis.T)
        if not all_finite(rows):
            return float("inf")
        norm = float(torch.linalg.matrix_norm(rows, 2))
    return norm
