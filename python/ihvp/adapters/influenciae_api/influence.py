"""`deel.influenciae.influence`: influence functions of first and second order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ihvp
from ihvp.adapters.influenciae_api._results import Groups, Influence
from ihvp.adapters.influenciae_api.common import IHVPFactory, built


class FirstOrderInfluenceCalculator(Influence, Groups):
    """`normalize=True` is RelatIF. Without an IHVP object the exact Hessian of the dataset."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator: ihvp.IHVP | IHVPFactory | str = "exact",
        normalize: bool = False,
    ) -> None:
        self.native = ihvp.FirstOrderInfluenceCalculator(
            model, dataset, built(ihvp_calculator, model, dataset), normalize
        )


class SecondOrderInfluenceCalculator(Groups):
    """Groups to second order."""

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        dataset: Iterable[Any],
        ihvp_calculator: ihvp.IHVP | IHVPFactory | str = "exact",
    ) -> None:
        self.native = ihvp.SecondOrderInfluenceCalculator(model, dataset, built(ihvp_calculator, model, dataset))


class ArnoldiInfluenceCalculator(Influence):
    """First-order influence in the span of the Hessian's `k_largest_eig_vals` largest eigenvectors.

    They are found in a Krylov space of `subspace_dim` dimensions, orthogonalised as that of a symmetric matrix.
    """

    def __init__(
        self,
        model: ihvp.InfluenceModel,
        train_dataset: Iterable[Any],
        subspace_dim: int,
        force_hermitian: bool,
        k_largest_eig_vals: int,
    ) -> None:
        if not force_hermitian:
            raise ValueError("force_hermitian must be True: the Hessian is symmetric, and is treated as such")
        curvature = ihvp.ArnoldiIHVP(model, train_dataset, rank=k_largest_eig_vals, krylov_dimension=subspace_dim)
        self.native = ihvp.FirstOrderInfluenceCalculator(model, train_dataset, curvature)
