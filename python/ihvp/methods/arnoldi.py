"""F ~ its few eigenpairs of largest magnitude, by a Krylov method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.iterative import check_on_failure, check_positive, complain
from ihvp.methods.low_rank import LowRankIHVP
from ihvp.methods.products import CurvatureProducts
from ihvp.model import InfluenceModel


class ArnoldiIHVP(LowRankIHVP):
    """The eigenpairs of largest magnitude of the curvature, by ARPACK's implicitly restarted Lanczos iteration.

    Passes over data: one for each Lanczos vector, while the linearised batches do not fit into memory. At full rank the
    matrix is diagonalised whole.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the sum of the eigenvalues found, divided by the number of
            parameters; or one of them for each block.
        rank: eigenpairs, at most the parameters of a block.
        curvature: "hessian", "gauss_newton" or "fisher".
        krylov_dimension: Lanczos vectors. None: max(2 rank + 1, 20), at most the parameters of a block.
        tol: relative accuracy of the eigenvalues.
        maxiter: restarts. None: 10 p.
        complement: "dropped" solves on the span of the eigenvectors alone, "damped" takes the curvature as zero off it,
            so that the damping is divided by there (Woodbury's formula).
        seed: of the first Lanczos vector.
        on_failure: what to do when fewer eigenpairs than `rank` converged: "warn" and "return" take those that did,
            "raise" raises a ConvergenceError.
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.

    Source: Schioppa et al. 2022 (arXiv:2112.03052), section 3.2; Lehoucq, Sorensen and Yang 1998 for ARPACK.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 0.0,
        rank: int = 10,
        curvature: str = "hessian",
        *,
        krylov_dimension: int | None = None,
        tol: float = 1e-6,
        maxiter: int | None = None,
        complement: str = "dropped",
        seed: int = 0,
        on_failure: str = "warn",
        block_structure: BlockStructure = "full",
    ) -> None:
        check_positive(krylov_dimension=krylov_dimension, tol=tol, maxiter=maxiter)
        if krylov_dimension is not None and krylov_dimension <= rank:
            raise ValueError(f"krylov_dimension must be larger than rank={rank}, got {krylov_dimension}")
        check_on_failure(on_failure)
        self.krylov_dimension, self.tol, self.maxiter = krylov_dimension, tol, maxiter
        self.seed = seed
        self.on_failure = on_failure
        super().__init__(model, hessian_loader, damping, rank, curvature, complement, block_structure)

    def _config(self) -> dict[str, Any]:
        names = ("krylov_dimension", "tol", "maxiter", "complement", "seed", "on_failure")
        return super()._config() | {name: getattr(self, name) for name in names}

    def _approximate(self, products: CurvatureProducts, block: str) -> tuple[Tensor, Tensor]:
        p, device = self._block_size(block), self.model.device
        if self.rank >= p:
            matrix = products(block, torch.eye(p, dtype=torch.float64, device=device))
            values, U = torch.linalg.eigh((matrix + matrix.T) / 2)
            return U, values

        def matvec(v: Any) -> Any:
            row = torch.from_numpy(numpy.ascontiguousarray(v).reshape(1, p)).to(device)
            return products(block, row)[0].cpu().numpy()

        ncv = max(2 * self.rank + 1, 20) if self.krylov_dimension is None else self.krylov_dimension
        try:
            values, U = eigsh(
                LinearOperator((p, p), matvec=matvec, dtype=numpy.float64),
                k=self.rank,
                which="LM",
                ncv=min(p, ncv),
                tol=self.tol,
                maxiter=self.maxiter,
                v0=numpy.random.default_rng(self.seed).standard_normal(p),
            )
        except ArpackNoConvergence as failure:
            values, U = failure.eigenvalues, failure.eigenvectors
            message = (
                f"block {block!r}: {len(values)} of {self.rank} eigenpairs reached tol={self.tol:g} within the "
                "iterations; a larger krylov_dimension or maxiter helps"
            )
            complain("raise" if len(values) == 0 else self.on_failure, message)
        return torch.from_numpy(U.copy()).to(device), torch.from_numpy(values.copy()).to(device)
