"""F = (1/N) sum_n g_n g_n^T over all tracked parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.methods.base import read_state
from ihvp.methods.blocks import BlockStructure, apart
from ihvp.methods.damping import Damping
from ihvp.methods.full import FlatIHVP
from ihvp.methods.kronecker import check_fisher, target_generator
from ihvp.methods.tokens import (
    Tokens,
    gradient_dots,
    gradient_sums,
    join,
    kernel,
    on_device,
    read_tokens,
    rows,
    token_batches,
    tokens_state,
    wide,
    within,
)
from ihvp.model import InfluenceModel


class FisherIHVP(FlatIHVP):
    """The Fisher matrix itself, all layers and their interactions. Passes over data: one.

    While there are fewer examples than parameters p, the examples' tokens are kept and systems are solved by the
    N x N kernel K = G G^T, by Woodbury: (F + damping I)^-1 v = (v - G^T (K + N damping I)^-1 G v) / damping, where row
    n of G is g_n, never formed. From N = p on, the p x p matrix is summed instead. Both solve by Cholesky in float64;
    Woodbury's subtraction loses digits at tiny dampings (1e-9 relative at 1e-7 of the largest eigenvalue).

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue of F; or one of them for each block.
        fisher: "empirical" takes the data's own targets, "sampled" draws them from the model (seeded by `seed`).
        block_structure: "full", "layer", "parameter" or a mapping of block names to layers and parameters; p is then
            the size of a block.

    Source: Koh and Liang 2017 (arXiv:1703.04730) with the Fisher of Martens 2020 (arXiv:1412.1193), section 9.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        fisher: str = "empirical",
        *,
        block_structure: BlockStructure = "full",
        seed: int = 0,
    ) -> None:
        check_fisher(fisher)
        self.fisher = fisher
        self.seed = seed
        self._examples = 0
        self._sums: dict[str, Tensor] = {}  # sum_n g_n g_n^T (p_b,p_b) of the blocks with p_b <= N, and
        self._kernels: dict[str, Tensor] = {}  # K (N,N) of the others, and
        self._tokens: Tokens = {}  # the examples, unless N reaches every p_b
        self._factors: dict[tuple[str, float], Tensor] = {}
        super().__init__(model, hessian_loader, damping, block_structure)

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"fisher": self.fisher, "seed": self.seed}

    @property
    def is_fitted(self) -> bool:
        return self._examples > 0

    def fit(self, loader: Iterable[Any]) -> FisherIHVP:
        largest = max(self._block_size(block) for block in self.blocks)
        kept: list[Tokens] = []
        sums: dict[str, Tensor] = {}
        examples = 0
        generator = target_generator(self.fisher, self.seed)
        for tokens in token_batches(self.model, loader, "Fisher", generator):
            kept.append(tokens)
            examples += len(next(iter(tokens.values()))[0])
            if examples >= largest:
                sums = sums or {block: self._zeros(block) for block in self.blocks}
                while kept:
                    self._add(sums, kept.pop())
        self._take(examples, sums, join(kept) if kept else {})
        return self

    def _merge(self, others: Sequence[FisherIHVP]) -> None:
        parts = (self, *others)
        examples = sum(part._examples for part in parts)
        tokens = [on_device(part._tokens, self.model) for part in parts if part._tokens]
        if len(tokens) == len(parts) and examples < max(self._block_size(block) for block in self.blocks):
            self._take(examples, {}, join(tokens))
            return
        sums = {block: self._zeros(block) for block in self.blocks}
        for own in tokens:
            self._add(sums, own)
        for part in parts:
            if not part._tokens:
                for block, total in sums.items():
                    total += part._sums[block].to(total.device)
        self._take(examples, sums, {})

    def _zeros(self, block: str) -> Tensor:
        p = self._block_size(block)
        return torch.zeros(p, p, dtype=torch.float64, device=self.model.device)

    def _add(self, sums: dict[str, Tensor], tokens: Tokens) -> None:
        for block, total in sums.items():
            ops.covariance_update_(total, rows(wide(within(tokens, self.blocks[block]))))

    def _take(self, examples: int, sums: dict[str, Tensor], tokens: Tokens) -> None:
        kernels = {}
        if tokens:
            sums = {block: self._zeros(block) for block in self.blocks if self._block_size(block) <= examples}
            self._add(sums, tokens)
            others = [block for block in self.blocks if block not in sums]
            kernels = {block: kernel(wide(within(tokens, self.blocks[block]))) for block in others}
        self._examples, self._sums, self._tokens, self._kernels, self._factors = examples, sums, tokens, kernels, {}

    def _mean_eigenvalue(self, block: str) -> float:
        own = self._sums[block] if block in self._sums else self._kernels[block]
        return float(own.trace()) / self._examples / self._block_size(block)

    def _factor(self, block: str, damping: float) -> Tensor:
        """Cholesky factor of F + damping I, or of K + N damping I."""
        key = (block, damping)
        if key not in self._factors:
            if block in self._sums:
                matrix = self._sums[block] / self._examples
                matrix.diagonal().add_(damping)
            else:
                if damping == 0:
                    raise torch.linalg.LinAlgError(
                        f"block {block!r}: the Fisher matrix of {self._examples} examples and "
                        f"{self._block_size(block)} parameters is singular, its smallest eigenvalue is 0; it needs a "
                        "positive damping"
                    )
                matrix = self._kernels[block].clone()
                matrix.diagonal().add_(damping * self._examples)
            L, info = torch.linalg.cholesky_ex(matrix)
            pivot = float(L.diagonal().min()) ** 2
            if int(info) or not pivot > len(matrix) * torch.finfo(torch.float64).eps * float(matrix.diagonal().max()):
                smallest = float(torch.linalg.eigvalsh(matrix)[0])
                raise torch.linalg.LinAlgError(
                    f"block {block!r}: the Fisher matrix with damping {damping:.3g} is singular: its smallest "
                    f"eigenvalue is {smallest:.3g}; a larger damping helps"
                )
            if len(self._factors) >= 4 * len(self.blocks):  # of a few dampings at a time
                self._factors.clear()
            self._factors[key] = L
        return self._factors[key]

    def _solve_block(self, block: str, v: Tensor, dampings: list[float]) -> Tensor:
        if block in self._sums:
            return torch.stack([torch.cholesky_solve(v.T, self._factor(block, value)).T for value in dampings])
        tokens = wide(within(self._tokens, self.blocks[block]))
        dots = gradient_dots(tokens, apart(self.model, self.blocks[block], v))
        solutions = []
        for value in dampings:
            coefficients = torch.cholesky_solve(dots.T, self._factor(block, value)).T
            solutions.append((v - gradient_sums(tokens, coefficients)) / value)
        return torch.stack(solutions)

    def _multiply_block(self, block: str, v: Tensor) -> Tensor:
        if block in self._sums:
            return v @ self._sums[block] / self._examples
        tokens = wide(within(self._tokens, self.blocks[block]))
        return gradient_sums(tokens, gradient_dots(tokens, apart(self.model, self.blocks[block], v)) / self._examples)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        state = {"examples": torch.tensor(self._examples)}
        if not self._tokens:
            return state | {f"{block}/sum": total for block, total in self._sums.items()}
        return state | tokens_state(self._tokens)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if "examples" not in state or state["examples"].numel() != 1:
            raise ValueError("FisherIHVP: the state has no 'examples'; it is of another method")
        examples = int(state["examples"])
        others = {key: x for key, x in state.items() if key != "examples"}
        shapes = {f"{block}/sum": (self._block_size(block),) * 2 for block in self.blocks}
        if set(others) & set(shapes):
            own = read_state(others, shapes, "FisherIHVP")
            self._take(examples, {block: own[f"{block}/sum"].to(self.model.device) for block in self.blocks}, {})
            return
        tokens = read_tokens(self.model, others, "FisherIHVP")
        kept = len(next(iter(tokens.values()))[0])
        if kept != examples:
            raise ValueError(f"FisherIHVP: the state must have the tokens of {examples} examples, got {kept}")
        self._take(examples, {}, tokens)
