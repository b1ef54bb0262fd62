"""(F + damping I)^-1 v by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.base import IHVP
from ihvp.methods.blocks import BlockStructure, put_, take
from ihvp.methods.damping import Damping
from ihvp.methods.iterative import IterationReport, IterativeIHVP, check_positive
from ihvp.methods.preconditioners import Preconditioner, Preconditioning
from ihvp.methods.products import Product
from ihvp.model import InfluenceModel

KRYLOV = ("separate", "shared")


class CgIHVP(IterativeIHVP):
    """Conjugate gradients on the damped curvature, all right-hand sides in one pass over the data an iteration.

    A system has converged when ||r|| <= max(rtol ||b||, atol). The residuals are those of the recurrence. A direction d
    with d^T (F + damping I) d <= 0 ends the iterations of its system (with krylov="shared": of all) before the step
    along it: the damped curvature is not positive definite, and the failure says so.

    Several dampings share their products, by the shift invariance of Krylov spaces, where krylov="separate" and there
    is no preconditioner.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue, estimated; or one of them for each block.
        curvature: "hessian", "gauss_newton" or "fisher".
        rtol, atol: the tolerances; gradients that are small themselves need a smaller atol.
        maxiter: None: 10 p for a block of p parameters.
        krylov: "separate" gives each right-hand side its own Krylov space; "shared" is block CG: all of them search in
            the sum of their spaces, which takes fewer iterations, the fewer the more right-hand sides there are.
        preconditioner: None, a JacobiPreconditioner or NystroemPreconditioner, which are fitted with the object, or a
            fitted IHVP of the same model such as EKFACIHVP, which is applied with its own damping.
        on_failure: "warn", "raise" or "return"; `reports` has iterations and residuals.
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.

    Source: Hestenes and Stiefel 1952; Jegerlehner 1996 (arXiv:hep-lat/9612014), eq. 2.42 to 2.46 for several dampings;
    Ji and Li 2017 (10.1007/s10543-016-0631-z), algorithm 2 for block CG; Martens 2010 for its use on Hessians.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 0.0,
        curvature: str = "hessian",
        *,
        rtol: float = 1e-4,
        atol: float = 1e-6,
        maxiter: int | None = None,
        krylov: str = "separate",
        preconditioner: Preconditioner | IHVP | None = None,
        on_failure: str = "warn",
        block_structure: BlockStructure = "full",
    ) -> None:
        if krylov not in KRYLOV:
            raise ValueError(f"krylov must be one of {', '.join(KRYLOV)}, got {krylov!r}")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value!r}")
        check_positive(maxiter=maxiter)
        if isinstance(preconditioner, IHVP):
            if preconditioner.model is not model:
                raise ValueError("preconditioner must be an IHVP object of this model, got one of another")
        elif preconditioner is not None and not isinstance(preconditioner, Preconditioner):
            raise TypeError(
                "preconditioner must be None, a JacobiPreconditioner, a NystroemPreconditioner or an IHVP object, "
                f"got {type(preconditioner).__name__}"
            )
        self.rtol, self.atol, self.maxiter, self.krylov = rtol, atol, maxiter, krylov
        self.preconditioner = preconditioner
        self._preconditionings: dict[str, Preconditioning] = {}
        super().__init__(model, hessian_loader, damping, curvature, on_failure, block_structure)

    def fit(self, loader: Iterable[Any]) -> CgIHVP:
        before = self._products
        super().fit(loader)
        if isinstance(self.preconditioner, Preconditioner):
            try:
                made = {block: self._fitted_preconditioner(self.preconditioner, block) for block in self.blocks}
            except BaseException:
                self._products = before
                raise
            self._preconditionings = made
        return self

    def _fitted_preconditioner(self, preconditioner: Preconditioner, block: str) -> Preconditioning:
        return preconditioner.fit(lambda v: self.products(block, v), self._block_size(block), self.model)

    def _precondition(self, block: str, damping: float) -> Product | None:
        if isinstance(self.preconditioner, IHVP):
            other = self.preconditioner
            return lambda v: self._solve_by(other, block, v)
        if self.preconditioner is None:
            return None
        own = self._preconditionings[block]
        return lambda v: own(v, damping)

    def _solve_by(self, other: IHVP, block: str, v: Tensor) -> Tensor:
        """The block of another object's solution for a vector that is zero elsewhere."""
        model, own = self.model, self.blocks[block]
        V = {
            name: torch.zeros(len(v), *layer.shape, dtype=model.dtype, device=v.device)
            for name, layer in model.layers.items()
        }
        put_(V, model, own, v.to(model.dtype))
        return take(other.solve(V), own).double()

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        norms = v.norm(dim=1)
        threshold = (self.rtol * norms).clamp_min(self.atol)
        maxiter = 10 * self._block_size(block) if self.maxiter is None else self.maxiter

        def product(x: Tensor) -> Tensor:
            return self.products(block, x)

        if self.krylov == "separate" and self.preconditioner is None:
            x, residuals, steps, lowest = shifted_cg(product, v, dampings, threshold, maxiter, None)
            separate = len(dampings) > 1 and lowest <= 0  # where the smallest damping ends, a larger one need not
        else:
            separate = True
        if separate:
            solver = shifted_cg if self.krylov == "separate" else block_cg
            own = [
                solver(product, v, [value], threshold, maxiter, self._precondition(block, value)) for value in dampings
            ]
            x, residuals = torch.cat([one[0] for one in own]), torch.cat([one[1] for one in own])
            steps, lowest = sum(one[2] for one in own), min((one[3] for one in own), default=math.inf)
        report = IterationReport(
            steps,
            residuals / norms.clamp_min(torch.finfo(torch.float64).tiny),
            residuals <= threshold,
            f", and the damped curvature is not positive definite: d^T (F + damping I) d / d^T d = {lowest:.3g} was met"
            if lowest <= 0
            else "",
        )
        self._report(
            block,
            report,
            f"rtol={self.rtol:g}, atol={self.atol:g}",
            "a larger damping, a preconditioner or a larger maxiter helps",
        )
        return x


Solved = tuple[Tensor, Tensor, int, float]
"""x (D,Q,p), ||r|| (D,Q), iterations, the smallest d^T (F + shift I) d / d^T d of the directions searched."""
Solver = Callable[[Product, Tensor, "list[float]", Tensor, int, "Product | None"], Solved]


def shifted_cg(
    product: Product, b: Tensor, shifts: list[float], threshold: Tensor, maxiter: int, precondition: Product | None
) -> Solved:
    """Each row of b (Q,p) in its own Krylov space, for D shifts at once; with a preconditioner for one.

    The system of the smallest shift is iterated. The residual of another shift is zeta times its residual, so its
    solution and direction follow by scalars.
    """
    Q, D = len(b), len(shifts)
    lowest = min(shifts)
    seed = shifts.index(lowest)
    s = b.new_tensor(shifts).sub(lowest).view(D, 1)
    result, residuals = b.new_zeros(D, Q, b.shape[1]), b.new_zeros(D, Q)
    at = torch.arange(Q, device=b.device)  # the rows that are still iterated
    r, x = b, torch.zeros_like(result)
    z = r if precondition is None else precondition(r)
    p = z.expand(D, *z.shape).clone()
    rho = (r * z).sum(1)
    zeta = zeta_before = b.new_ones(D, Q)
    alpha_before, beta = b.new_ones(Q), b.new_zeros(Q)
    alive = torch.ones_like(at, dtype=torch.bool)
    steps, lowest_met = 0, math.inf
    while True:
        norms = zeta.abs() * r.norm(dim=1)
        open_ = (norms.amax(0) > threshold[at]) & alive if steps < maxiter else torch.zeros_like(alive)
        if not bool(open_.all()):
            result[:, at[~open_]], residuals[:, at[~open_]] = x[:, ~open_], norms[:, ~open_]
            at, r, rho, alpha_before, beta, alive = (y[open_] for y in (at, r, rho, alpha_before, beta, alive))
            x, p, zeta, zeta_before = (y[:, open_] for y in (x, p, zeta, zeta_before))
        if len(at) == 0:
            return result, residuals, steps, lowest_met
        steps += 1
        direction = p[seed]
        image = product(direction) + lowest * direction
        curvature = (direction * image).sum(1)
        alive = curvature > 0  # else the row ends here, without a step
        squares = direction.square().sum(1)
        lowest_met = min(lowest_met, float((curvature / torch.where(squares == 0, 1.0, squares)).min()))
        alpha = torch.where(alive, rho / torch.where(alive, curvature, 1.0), 0.0)
        denominator = alpha_before * zeta_before * (1 + alpha * s) + alpha * beta * (zeta_before - zeta)
        zeta_next = torch.where(s == 0, zeta, zeta * zeta_before * alpha_before / denominator)
        x = x + (alpha * zeta_next / zeta).unsqueeze(2) * p
        r = r - alpha.unsqueeze(1) * image
        z = r if precondition is None else precondition(r)
        rho_next = (r * z).sum(1)
        beta = rho_next / torch.where(rho == 0, 1.0, rho)
        p = zeta_next.unsqueeze(2) * z + (beta * (zeta_next / zeta).square()).unsqueeze(2) * p
        rho, alpha_before, zeta, zeta_before = rho_next, alpha, zeta_next, zeta


def block_cg(
    product: Product, b: Tensor, shifts: list[float], threshold: Tensor, maxiter: int, precondition: Product | None
) -> Solved:
    """All rows of b (Q,p) in the sum of their Krylov spaces, for one shift. Directions that depend on others go."""
    (shift,) = shifts
    norms = b.norm(dim=1)
    scale = torch.where(norms == 0, 1.0, norms).unsqueeze(1)
    r, x = b / scale, torch.zeros_like(b)
    p = _orthonormal(r if precondition is None else precondition(r))
    steps, lowest = 0, math.inf
    while True:
        residuals = r.norm(dim=1) * scale[:, 0]
        if steps == maxiter or len(p) == 0 or bool((residuals <= threshold).all()):
            return (x * scale).unsqueeze(0), residuals.unsqueeze(0), steps, lowest
        steps += 1
        image = product(p).add_(p, alpha=shift)
        gram = p @ image.T
        gram = (gram + gram.T) / 2
        values, vectors = torch.linalg.eigh(gram)
        lowest = min(lowest, float(values[0]))
        if lowest <= 0:
            maxiter = steps
            continue
        inverse = (vectors / values) @ vectors.T
        alpha = r @ p.T @ inverse
        x.addmm_(alpha, p)
        r.addmm_(alpha, image, alpha=-1)
        z = r if precondition is None else precondition(r)
        p = _orthonormal(torch.addmm(z, z @ image.T @ inverse, p, alpha=-1))


def _orthonormal(rows: Tensor) -> Tensor:
    """A basis of the rows' span, orthonormal to 1e-6, dependent ones left out: by eigenvectors of the Gram matrix.

    That squares the rows' condition. Where it is large, a second pass makes orthonormal what rounding left.
    """
    norms = rows.norm(dim=1, keepdim=True)
    basis = rows / torch.where(norms == 0, 1.0, norms)
    eps = torch.finfo(rows.dtype).eps
    for _ in range(2):
        values, vectors = torch.linalg.eigh(basis @ basis.T)
        kept = values > len(rows) * eps * values[-1:].clamp_min(1e-300)
        basis = (vectors[:, kept] / values[kept].sqrt()).T @ basis
        if bool((values[kept] * 1e-6 > len(rows) * eps * values[-1:]).all()):
            break
    return basis
