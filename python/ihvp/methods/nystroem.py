"""F ~ (F Omega) (Omega^T F Omega)^+ (F Omega)^T for a random Omega."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.low_rank import LowRankIHVP
from ihvp.methods.products import CurvatureProducts, Product
from ihvp.model import InfluenceModel


class NystroemIHVP(LowRankIHVP):
    """A Nystroem sketch of the curvature, solved by Woodbury. Passes over data: one.

    F ~ U diag(Lambda) U^T of the given rank; off the range of U the damped curvature is damping I. At full rank it is
    F itself. An indefinite Hessian may be sketched badly: curvature="gauss_newton" is never indefinite for a loss that
    is convex in the outputs.

    Args:
        damping: a number > 0, or "auto": 0.1 times the mean eigenvalue of the sketch; or one of them for each block.
        rank: columns of the sketch, at most the parameters of a block.
        curvature: "hessian", "gauss_newton" or "fisher".
        seed: of Omega.
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.

    Source: Hataya and Yamada 2023 (arXiv:2302.09726), eq. 4 to 6; Frangella, Tropp and Udell 2023 (arXiv:2110.02820).
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        rank: int = 10,
        curvature: str = "hessian",
        *,
        seed: int = 0,
        block_structure: BlockStructure = "full",
    ) -> None:
        self.seed = seed
        super().__init__(model, hessian_loader, damping, rank, curvature, "damped", block_structure)

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"seed": self.seed}

    def _approximate(self, products: CurvatureProducts, block: str) -> tuple[Tensor, Tensor]:
        p = self._block_size(block)
        return nystroem_sketch(lambda v: products(block, v), p, self.rank, self.seed, self.model)


def nystroem_sketch(product: Product, p: int, rank: int, seed: int, model: InfluenceModel) -> tuple[Tensor, Tensor]:
    """(U (p,r), Lambda (r,)) of (F Omega) (Omega^T F Omega)^+ (F Omega)^T, which depends on Omega's range alone.

    Omega is a normal random matrix in the net's dtype, as the products are. Its columns are made orthonormal where they
    are not nearly so: (p,r) with r <= p/4 has a condition of about 3 at most.

    With Omega^T F Omega = W diag(s) W^T it is B diag(sign s) B^T, B = F Omega W / sqrt(|s|), and U comes of B's QR
    decomposition. Values s that are zero to the products' rounding are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    Omega = torch.randn(p, min(rank, p), dtype=model.dtype, generator=generator).to(model.device)
    Omega = (Omega / p**0.5 if 4 * rank <= p else torch.linalg.qr(Omega).Q).double()
    Y = product(Omega.T).T
    core = Omega.T @ Y
    s, W = torch.linalg.eigh((core + core.T) / 2)
    kept = s.abs() > torch.finfo(model.dtype).eps * p**0.5 * s.abs().max()
    B = Y @ W[:, kept] / s[kept].abs().sqrt()
    Q, R = torch.linalg.qr(B)
    values, V = torch.linalg.eigh(R * s[kept].sign() @ R.T)
    return Q @ V, values
