"""DataInf: layer by layer, the mean of the inverses of damped rank-one matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.harmonic_mean import InverseHarmonicMeanIHVP
from ihvp.model import InfluenceModel


class DataInfIHVP(InverseHarmonicMeanIHVP):
    """The inverse harmonic mean with the blocks and the damping of DataInf.

    Each layer is a block, and its damping is 0.1 / (N p_b) sum_n ||g_n||^2, which is "auto".

    Source: Kwon et al. 2023 (arXiv:2310.00902), eq. 5 and section 3.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = "auto",
        *,
        block_structure: BlockStructure = "layer",
    ) -> None:
        super().__init__(model, hessian_loader, damping, block_structure=block_structure)
