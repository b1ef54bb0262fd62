"""IHVP objects over flat vectors: what curvatures that do not stop at a layer's border share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.base import IHVP, Vectors
from ihvp.methods.blocks import Block, BlockStructure, block_size, put_, take
from ihvp.methods.damping import Damping, resolve_damping
from ihvp.model import InfluenceModel


class FlatIHVP(IHVP):
    """An IHVP that sees each block of its structure as flat vectors (Q,p_b) in float64, layer after layer.

    Args:
        block_structure: "full" (one block), "layer", "parameter", or a mapping from block names to the names of their
            layers and parameters.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None,
        damping: Damping,
        block_structure: BlockStructure,
    ) -> None:
        self.block_structure = block_structure
        super().__init__(model, hessian_loader, damping)

    @abstractmethod
    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        """(D,Q,p_b): (F + damping I)^-1 v for each of D dampings."""

    @abstractmethod
    def _multiply_block(self, block: str, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _mean_eigenvalue(self, block: str) -> float: ...

    def _config(self) -> dict[str, Any]:
        structure = self.block_structure
        if isinstance(structure, Mapping):
            structure = {block: list(names) for block, names in structure.items()}
        damping = dict(self.damping) if isinstance(self.damping, Mapping) else self.damping
        return {"damping": damping, "block_structure": structure}

    def _solve(self, V: Vectors, damping: Damping) -> Vectors:
        return {name: x[0] for name, x in self._solve_several(V, [damping]).items()}

    def _solve_several(self, V: Vectors, dampings: list[Damping]) -> Vectors:
        def solve(block: str, v: Tensor) -> Tensor:
            return self._solve_block(block, v, [self._value(block, damping) for damping in dampings])

        return self._by_block(V, (len(dampings),), solve)

    def _multiply(self, V: Vectors) -> Vectors:
        return self._by_block(V, (), self._multiply_block)

    def _by_block(self, V: Vectors, leading: tuple[int, ...], f: Any) -> Vectors:
        model = self.model
        result = {name: torch.empty(*leading, *v.shape, dtype=model.dtype, device=v.device) for name, v in V.items()}
        for block, own in self.blocks.items():
            put_(result, model, own, f(block, take(V, own).double()))
        return result

    def _value(self, block: str, damping: Damping) -> float:
        """The damping of a block as a number; the mean eigenvalue is computed only where "auto" asks for it."""
        own = damping[block] if isinstance(damping, Mapping) else damping
        return resolve_damping(own, block, self._mean_eigenvalue(block) if own == "auto" else 0.0)

    def _block_size(self, block: str) -> int:
        return block_size(self.model, self.blocks[block])


def positions(model: InfluenceModel, block: Block) -> Tensor:
    """Where a block's parameters stand in the flat vector of all of them, (p_b,)."""
    sizes = [O * I for O, I in (layer.shape for layer in model.layers.values())]
    everything = torch.arange(sum(sizes)).split(sizes)
    named = {name: part.view(layer.shape) for (name, layer), part in zip(model.layers.items(), everything, strict=True)}
    return take(named, block)
