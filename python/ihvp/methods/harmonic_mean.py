"""(F + damping I)^-1 ~ (1/N) sum_n (g_n g_n^T + damping I)^-1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp.methods.blocks import BlockStructure, apart
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP
from ihvp.methods.tokens import (
    Tokens,
    gradient_dots,
    gradient_sums,
    join,
    on_device,
    read_tokens,
    squared_norms,
    token_batches,
    tokens_state,
    wide,
    within,
)
from ihvp.model import InfluenceModel


class InverseHarmonicMeanIHVP(FlatIHVP):
    """The mean of the inverses of the damped rank-one matrices g_n g_n^T in place of the inverse of their mean.

    By Sherman and Morrison x = (v - (1/N) sum_n g_n <g_n, v> / (damping + ||g_n||^2)) / damping. Passes over data: one,
    which keeps the examples' tokens; gradients are not formed. `multiply` is that of the mean itself, the empirical
    Fisher matrix F: an undamped harmonic mean does not exist.

    Args:
        damping: a number > 0, or "auto": 0.1 times the mean eigenvalue of F; or one of them for each block.
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters.

    Source: Kwon et al. 2023 (arXiv:2310.00902), eq. 5, for blocks of any structure.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        *,
        block_structure: BlockStructure = "full",
    ) -> None:
        self._tokens: Tokens = {}
        self._norms: dict[str, Tensor] = {}  # block name -> ||g_n||^2 (N,)
        super().__init__(model, hessian_loader, damping, block_structure)

    @property
    def is_fitted(self) -> bool:
        return bool(self._tokens)

    def fit(self, loader: Iterable[Any]) -> InverseHarmonicMeanIHVP:
        self._take(join(list(token_batches(self.model, loader, "harmonic mean"))))
        return self

    def _merge(self, others: Sequence[InverseHarmonicMeanIHVP]) -> None:
        self._take(join([on_device(own._tokens, self.model) for own in (self, *others)]))

    def _take(self, tokens: Tokens) -> None:
        self._norms = {block: squared_norms(wide(within(tokens, own))) for block, own in self.blocks.items()}
        self._tokens = tokens

    def _mean_eigenvalue(self, block: str) -> float:
        return float(self._norms[block].mean()) / self._block_size(block)

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        if not min(dampings) > 0:
            raise torch.linalg.LinAlgError(
                f"block {block!r}: g_n g_n^T is singular, its smallest eigenvalue is 0; it needs a positive damping"
            )
        tokens, norms = wide(within(self._tokens, self.blocks[block])), self._norms[block]
        dots = gradient_dots(tokens, apart(self.model, self.blocks[block], v)) / len(norms)
        return torch.stack([(v - gradient_sums(tokens, dots / (value + norms))) / value for value in dampings])

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        tokens = wide(within(self._tokens, self.blocks[block]))
        dots = gradient_dots(tokens, apart(self.model, self.blocks[block], v))
        return gradient_sums(tokens, dots / len(self._norms[block]))

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        return tokens_state(self._tokens)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._take(read_tokens(self.model, state, type(self).__name__))
