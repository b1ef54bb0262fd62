"""F ~ U diag(Lambda) U^T with few columns: what Arnoldi and Nystroem objects share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.blocks import BlockStructure
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP
from ihvp.methods.iterative import check_positive
from ihvp.methods.products import CurvatureProducts, check_curvature
from ihvp.model import InfluenceModel

COMPLEMENTS = ("dropped", "damped")


class LowRankIHVP(FlatIHVP):
    """An IHVP by a few orthonormal columns U and eigenvalues Lambda of each block.

    complement="damped" solves (U diag(Lambda) U^T + damping I) x = v by Woodbury. complement="dropped" solves on the
    range of U alone: x = U diag(1 / (Lambda + damping)) U^T v.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None,
        damping: Damping,
        rank: int,
        curvature: str,
        complement: str,
        block_structure: BlockStructure,
    ) -> None:
        check_curvature(curvature)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be a whole number, got {rank!r}")
        check_positive(rank=rank)
        if complement not in COMPLEMENTS:
            raise ValueError(f"complement must be one of {', '.join(COMPLEMENTS)}, got {complement!r}")
        self.rank = rank
        self.curvature = curvature
        self.complement = complement
        self._low_rank: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(model, hessian_loader, damping, block_structure)

    @abstractmethod
    def _approximate(self, products: CurvatureProducts, block: str) -> tuple[Tensor, Tensor]:
        """U (p_b,r) and Lambda (r,), in float64."""

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"rank": self.rank, "curvature": self.curvature}

    @property
    def is_fitted(self) -> bool:
        return bool(self._low_rank)

    @property
    def evals(self) -> dict[str, Tensor]:
        """Block name -> the eigenvalues of its approximation, in float64."""
        self._check_fitted()
        return {block: values for block, (_, values) in self._low_rank.items()}

    def fit(self, loader: Iterable[Any]) -> LowRankIHVP:
        products = CurvatureProducts(self.model, loader, self.curvature, self.blocks)
        self._low_rank = {block: self._approximate(products, block) for block in self.blocks}
        return self

    def _mean_eigenvalue(self, block: str) -> float:
        return float(self._low_rank[block][1].sum()) / self._block_size(block)

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        U, values = self._low_rank[block]
        return (v @ U * values) @ U.T

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        U, values = self._low_rank[block]
        inside = v @ U
        solutions = []
        for damping in dampings:
            shifted = values + damping
            smallest = float(shifted.abs().min()) if len(shifted) else 0.0
            whole = len(values) == len(U)
            if self.complement == "damped" and not whole and damping == 0:
                raise torch.linalg.LinAlgError(
                    f"block {block!r}: the {self.curvature} of rank {len(values)} with {len(U)} parameters is "
                    "singular, its smallest eigenvalue is 0; it needs a positive damping"
                )
            if len(values) and not smallest > torch.finfo(torch.float64).eps * float(values.abs().max()):
                raise torch.linalg.LinAlgError(
                    f"block {block!r}: the {self.curvature} with damping {damping:.3g} is singular: its smallest "
                    f"eigenvalue is {smallest:.3g} in magnitude; a larger damping helps"
                )
            if self.complement == "dropped" or whole:
                solutions.append((inside / shifted) @ U.T)
            else:
                solutions.append((v - (inside * (values / shifted)) @ U.T) / damping)
        return torch.stack(solutions)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        state = {}
        for block, (U, values) in self._low_rank.items():
            state[f"{block}/vectors"], state[f"{block}/values"] = U, values
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        who = type(self).__name__
        if set(state) != {f"{block}/{key}" for block in self.blocks for key in ("vectors", "values")}:
            raise ValueError(
                f"{who}: the state must have vectors and values of the blocks {', '.join(map(repr, self.blocks))}, got "
                f"{', '.join(map(repr, state)) or 'nothing'}"
            )
        own = {}
        for block in self.blocks:
            U, values = state[f"{block}/vectors"], state[f"{block}/values"]
            p = self._block_size(block)
            if U.dim() != 2 or U.shape[0] != p or tuple(values.shape) != (U.shape[1],):
                raise ValueError(
                    f"{who}: the vectors of block {block!r} must be (p,r) with p={p} and its values (r,), got "
                    f"{tuple(U.shape)} and {tuple(values.shape)}; it is of another model"
                )
            device = self.model.device
            own[block] = (U.to(device, torch.float64, copy=True), values.to(device, torch.float64, copy=True))
        self._low_rank = own
