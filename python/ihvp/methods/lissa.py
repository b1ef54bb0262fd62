"""(F + damping I)^-1 v by a truncated Neumann series."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.iterative import ConvergenceError, IterationReport, IterativeIHVP, check_positive
from ihvp.model import InfluenceModel

GROWTH = 1e3  # of the residual, by which divergence is told from rounding


class LissaIHVP(IterativeIHVP):
    """LiSSA: h <- b + (1 - dampen) h - (F + damping I) h / scale, and x = h / scale.

    Each step takes the curvature of all the data, so that it converges: to the solution of
    (F + (damping + dampen scale) I) x = b, if and only if the eigenvalues of that matrix lie between 0 and 2 scale. A
    system has converged when the residual, which is the change of h, is at most rtol ||b||.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue, estimated; or one of them for each block.
        curvature: "hessian", "gauss_newton" or "fisher".
        maxiter, dampen, scale, rtol: as above.
        on_failure: "warn", "raise" or "return"; `reports` has iterations and residuals. A series that diverges raises a
            ConvergenceError in any case but "return".
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.

    Source: Agarwal, Bullins and Hazan 2017 (arXiv:1602.03943), section 3; Koh and Liang 2017 (arXiv:1703.04730).
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 0.0,
        curvature: str = "hessian",
        *,
        maxiter: int = 1000,
        dampen: float = 0.0,
        scale: float = 10.0,
        rtol: float = 1e-4,
        on_failure: str = "warn",
        block_structure: BlockStructure = "full",
    ) -> None:
        check_positive(maxiter=maxiter, scale=scale, rtol=rtol)
        if isinstance(dampen, bool) or not isinstance(dampen, (int, float)) or not 0 <= dampen < 1:
            raise ValueError(f"dampen must be in [0, 1), got {dampen!r}")
        self.maxiter, self.dampen, self.scale, self.rtol = maxiter, dampen, scale, rtol
        super().__init__(model, hessian_loader, damping, curvature, on_failure, block_structure)

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        D, (Q, p) = len(dampings), v.shape
        b = v.repeat(D, 1)
        shift = b.new_tensor(dampings).repeat_interleave(Q).unsqueeze(1)
        h, norms = b.clone(), b.norm(dim=1)
        residuals = torch.ones_like(norms)
        at = norms.nonzero().flatten()  # the rows that are still iterated
        residuals[norms == 0] = 0.0
        steps, diverged = 0, False
        while len(at) and steps < self.maxiter and not diverged:
            steps += 1
            whole = len(at) == len(b)
            own, own_b, own_shift = (h, b, shift) if whole else (h[at], b[at], shift[at])
            change = self.products(block, own).addcmul_(own_shift, own)
            change = torch.sub(own_b, change, alpha=1 / self.scale, out=change)
            if self.dampen > 0:
                change.sub_(own, alpha=self.dampen)
            if whole:
                h.add_(change)
            else:
                h[at] = own.add_(change)
            residuals[at] = change.norm(dim=1) / norms[at]
            diverged = not bool((residuals[at] < GROWTH).all())
            at = at[residuals[at] > self.rtol]
        report = IterationReport(steps, residuals.view(D, Q), (residuals <= self.rtol).view(D, Q))
        if diverged and self.on_failure != "return":
            self.reports[block] = report
            raise ConvergenceError(
                f"block {block!r}: LiSSA diverges: after {steps} iterations the relative residual is "
                f"{float(residuals.max()):.3g}; the damped curvature's eigenvalues must lie between 0 and 2 scale = "
                f"{2 * self.scale:g}: a larger scale or damping helps"
            )
        self._report(block, report, f"rtol={self.rtol:g}", "a smaller scale, a larger damping or more iterations help")
        return h.view(D, Q, p) / self.scale
