"""The Hessian, Gauss-Newton or Fisher matrix itself, solved directly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import Batch
from ihvp.methods.base import Vectors, batches, gradients, read_state
from ihvp.methods.blocks import BlockStructure, take
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP, positions
from ihvp.methods.kronecker import symmetric_part
from ihvp.methods.products import (
    CHUNK,
    Parameters,
    check_curvature,
    differentiating,
    hessian_product,
    linearise_outputs,
)
from ihvp.model import InfluenceModel

SEVERAL = 16  # dampings from which on an eigendecomposition costs less than a factorisation for each


class ExactIHVP(FlatIHVP):
    """The mean Hessian, Gauss-Newton matrix J^T H_outputs J or empirical Fisher matrix. Passes over data: one.

    The matrix of each block (p_b,p_b) is summed in float64 and factorised: by Cholesky where it is positive definite,
    by LU else; a Hessian may have negative eigenvalues, and the system is solved as it stands. For 16 dampings at once
    and for the pseudo-inverse it is diagonalised instead.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue; or one of them for each block.
        curvature: "hessian", "gauss_newton" (which needs a net that returns one tensor) or "fisher".
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.
        rcond: None refuses a singular system. A number takes the pseudo-inverse, in which eigenvalues of magnitude up
            to rcond times the largest count as infinite.
        train_hessian: a (p,p) matrix to take instead of fitting, its parameters in the order of the layers, each
            (O,I') row by row.

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 2; Martens 2020 (arXiv:1412.1193), section 8 for Gauss-Newton.
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
        for index, batch in batches(model, loader, self.curvature):
            with torch.inference_mode(False):
                ADD[self.curvature](totals, model, parameters, batch.outside_inference(), index)
            for block, total in totals.items():
                if not bool(total.diagonal().sum().isfinite()):
                    raise FloatingPointError(f"block {block!r}: the {self.curvature} of batch {index} is not finite")
            examples += batch.size
        self._take({block: total.div_(examples) for block, total in totals.items()})
        return self

    def _take(self, matrices: dict[str, Tensor]) -> None:
        self._matrices = {
            block: symmetric_part(M, f"block {block!r}: the {self.curvature}") for block, M in matrices.items()
        }
        self._eigen, self._factors = {}, {}

    def _mean_eigenvalue(self, block: str) -> float:
        return float(self._matrices[block].diagonal().mean())

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        return v @ self._matrices[block]

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        if self.rcond is not None or len(dampings) >= SEVERAL or block in self._eigen:
            return self._solve_by_eigenvalues(block, v, dampings)
        return torch.stack([self._factor(block, damping).solve(v) for damping in dampings])

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
            matrix = self._matrices[block].clone()
            matrix.diagonal().add_(damping)
            factor = _factorise(matrix)
            smallest = 1 / max(_spectral_norm(factor.solve, matrix), torch.finfo(torch.float64).tiny)
            self._check_regular(block, damping, smallest, _spectral_norm(lambda x: x @ matrix, matrix))
            if len(self._factors) >= 4 * len(self.blocks):  # of a few dampings at a time
                self._factors.clear()
            self._factors[key] = factor
        return self._factors[key]

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
        self._take({block: own[f"{block}/matrix"].to(device, torch.float64) for block in self.blocks})


@dataclass(frozen=True)
class _Factor:
    """A factorised symmetric matrix: Cholesky's L, or LU with its pivots."""

    LU: Tensor
    pivots: Tensor | None

    def solve(self, v: Tensor) -> Tensor:
        """Rows of v by the inverse."""
        if self.pivots is None:
            return torch.cholesky_solve(v.T, self.LU).T
        solution: Tensor = torch.linalg.lu_solve(self.LU, self.pivots, v.T).T
        return solution


def _factorise(matrix: Tensor) -> _Factor:
    L, info = torch.linalg.cholesky_ex(matrix)
    if int(info) == 0:
        return _Factor(L, None)
    LU, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return _Factor(LU, pivots)


def _spectral_norm(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """||M|| of a symmetric M from rows x -> x M, by five steps of subspace iteration: at most a few times too small.

    Infinite where the result is not finite, as that of a solve with an exact zero on the diagonal.
    """
    rows = torch.randn(4, len(like), dtype=like.dtype, generator=torch.Generator().manual_seed(0)).to(like.device)
    norm = 0.0
    for _ in range(5):
        basis = torch.linalg.qr(rows.T).Q
        rows = apply(basis.T)
        if not bool(rows.isfinite().all()):
            return float("inf")
        norm = float(torch.linalg.matrix_norm(rows, 2))
    return norm


Totals = dict[str, Tensor]
Add = Callable[[Totals, InfluenceModel, dict[str, Parameters], Batch, int], None]


def _add_hessian(
    totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters], batch: Batch, index: int
) -> None:
    """total += sum_n of the Hessian of the loss, row by row: its products with the unit vectors."""
    for block, total in totals.items():
        product, _ = hessian_product(model, parameters[block], batch, index)
        with torch.no_grad():
            for start in range(0, len(total), 4 * CHUNK):
                rows = torch.arange(start, min(start + 4 * CHUNK, len(total)), device=total.device)
                total[rows] += product(torch.nn.functional.one_hot(rows, len(total)).to(model.dtype))


def _add_gauss_newton(
    totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters], batch: Batch, index: int
) -> None:
    """total += sum_n J_n^T H_n J_n, J_n the Jacobian of the outputs, H_n the Hessian of the loss in the outputs.

    With H_n = U diag(s) U^T that is the sum of the squares of the rows of sqrt(s) U^T J_n, where s is not negative.
    """
    for block, total in totals.items():
        with differentiating(model):
            outputs, pull_back = linearise_outputs(parameters[block], batch)
            H = _output_hessians(model, batch, outputs)
        if not bool(H.isfinite().all()):
            raise FloatingPointError(f"the gauss_newton of batch {index} is not finite")
        values, U = torch.linalg.eigh(H)
        N, K = values.shape
        negligible = torch.finfo(model.dtype).eps * values.abs().amax(1, keepdim=True)
        roots = values.abs().sqrt() * (values.abs() > negligible)
        step = max(1, 4 * CHUNK // K)
        with torch.no_grad():
            for n in range(0, N, step):
                at = slice(n, n + step)
                seeds = torch.zeros(len(roots[at]), K, N, K, dtype=outputs.dtype, device=total.device)
                weighted = (U[at] * roots[at].unsqueeze(1)).mT.to(outputs.dtype)
                seeds[torch.arange(len(weighted)), :, torch.arange(n, n + len(weighted))] = weighted
                J = torch.vmap(pull_back, randomness="same")(seeds.view(-1, *outputs.shape))
                J = J.to(model.dtype)
                negative = (values[at] < 0).flatten() & (roots[at] > 0).flatten()
                ops.covariance_update_(total, J[~negative])
                if bool(negative.any()):
                    total -= J[negative].double().T @ J[negative].double()


def _output_hessians(model: InfluenceModel, batch: Batch, outputs: Tensor) -> Tensor:
    """(N,K,K): the Hessian of each example's loss in its outputs."""
    leaf = outputs.detach().requires_grad_()
    first = torch.autograd.grad(model.losses(leaf, batch, batch.targets).sum(), leaf, create_graph=True)[0]
    first = first.flatten(1) if first.dim() > 1 else first.unsqueeze(1)
    N, K = first.shape
    H = torch.zeros(N, K, K, dtype=torch.float64, device=outputs.device)
    for k in range(K):
        if first.requires_grad:
            row = torch.autograd.grad(first[:, k].sum(), leaf, retain_graph=True, allow_unused=True)[0]
            if row is not None:
                H[:, k] = row.reshape(N, K)
    return H


def _add_fisher(
    totals: Totals, model: InfluenceModel, parameters: dict[str, Parameters], batch: Batch, index: int
) -> None:
    g: Vectors = gradients(model, batch, index=index)
    for block, total in totals.items():
        ops.covariance_update_(total, take(g, parameters[block].block))


ADD: dict[str, Add] = {"hessian": _add_hessian, "gauss_newton": _add_gauss_newton, "fisher": _add_fisher}
