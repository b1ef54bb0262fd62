"""F = G (x) A for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.methods.base import Vectors, read_state
from ihvp.methods.damping import Damping, check_regular, resolve_damping
from ihvp.methods.eigenbasis import eigenbasis_quadratic, eigenbasis_queries
from ihvp.methods.kronecker import (
    CovarianceSums,
    Eigen,
    KroneckerIHVP,
    add_covariances,
    eigen_state,
    eigendecompose,
    read_sums,
    state_shapes,
    sum_covariances,
    sums_state,
)
from ihvp.methods.queries import LayerQueries, TokenQueries, masked, written_out
from ihvp.model import InfluenceModel, Layer

SPLITS = ("pi", "even", "none")


class KFACIHVP(KroneckerIHVP):
    """Kronecker-factored curvature: the block of a layer is G (x) A. Passes over data: one.

    The damping is split over the factors: (G + sqrt(damping)/pi I) (x) (A + pi sqrt(damping) I), with
    pi = sqrt((tr A / dim A) / (tr G / dim G)) for split="pi" and 1 for split="even"; split="none" solves
    G (x) A + damping I exactly, in the eigenbasis.

    Args:
        damping: a number >= 0, or "auto": 0.1 mean(lambda_G) mean(lambda_A) of the layer.
        split: "pi", "even" or "none".
        fisher: "empirical" takes the data's own targets, "sampled" draws them from the model (seeded by `seed`).
        use_pi: True and False are other words for split="pi" and "even".

    Attributes:
        kfac_blocks: layer name -> (A, G) in float64; evecs: -> (U_A, U_G); evals: -> outer(lambda_G, lambda_A).

    Source: Martens and Grosse 2015 (arXiv:1503.05671), sections 3 and 6.3.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        split: str = "pi",
        fisher: str = "empirical",
        *,
        use_pi: bool | None = None,
        seed: int = 0,
    ) -> None:
        if use_pi is not None:
            split = "pi" if use_pi else "even"
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.split = split
        self._factors: dict[tuple[str, float], tuple[Tensor, Tensor]] = {}
        super().__init__(model, hessian_loader, damping, fisher, seed)

    def _config(self) -> dict[str, Any]:
        return {"damping": self.damping, "split": self.split, "fisher": self.fisher, "seed": self.seed}

    @property
    def is_fitted(self) -> bool:
        return bool(self._sums)

    def fit(self, loader: Iterable[Any]) -> KFACIHVP:
        sums = sum_covariances(self.model, loader, self.fisher, self.seed)
        self._take(sums, eigendecompose(self.model, sums))
        return self

    def _merge(self, others: Sequence[KFACIHVP]) -> None:
        sums = add_covariances([own._sums for own in (self, *others)])
        self._take(sums, eigendecompose(self.model, sums))

    def _take(self, sums: dict[str, CovarianceSums], eigen: dict[str, Eigen]) -> None:
        self._sums, self._eigen, self._factors = sums, eigen, {}

    def _eigenvalues(self, name: str) -> Tensor:
        own = self._eigen[name]
        return torch.outer(own.values_G, own.values_A).to(self.model.dtype)

    def _damping(self, name: str, damping: Damping) -> float:
        own = self._eigen[name]
        return resolve_damping(damping, name, float(own.values_G.mean() * own.values_A.mean()))

    def _solve_layer(self, name: str, V: Tensor, damping: Damping) -> Tensor:
        value = self._damping(name, damping)
        if self.split == "none":
            own, Lambda = self._eigen[name], self._regular(name, value)
            return ops.ekfac_solve(V, own.U_A, own.U_G, Lambda, value)
        L_A, L_G = self._factorized(name, value)
        return ops.kfac_solve(V, L_A, L_G)

    def _regular(self, name: str, damping: float) -> Tensor:
        """Lambda, after the check that Lambda + damping can be divided by."""
        Lambda = self._eigenvalues(name)
        check_regular(f"layer {name!r}", float(Lambda.min()), float(Lambda.max()), damping)
        return Lambda

    def _factorized(self, name: str, damping: float) -> tuple[Tensor, Tensor]:
        """Cholesky factors, made in float64 once for each damping."""
        key = (name, damping)
        if key not in self._factors:
            own = self._sums[name]
            if damping == 0:
                self._regular(name, damping)
            try:
                L_A, L_G = ops.kfac_factorize(own.A, own.G, damping, split=self.split)
            except torch.linalg.LinAlgError as error:
                raise torch.linalg.LinAlgError(f"layer {name!r}: {error}") from None
            if len(self._factors) >= 4 * len(self._sums):  # of a few dampings at a time
                self._factors.clear()
            self._factors[key] = (L_A.to(self.model.dtype), L_G.to(self.model.dtype))
        return self._factors[key]

    def _multiply(self, V: Vectors) -> Vectors:
        return {name: own.G.to(V[name].dtype) @ V[name] @ own.A.to(V[name].dtype) for name, own in self._sums.items()}

    def _solved_tokens(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The solution of a rank-one token is the pair of solved tokens: G^-1 delta a^T A^-1."""
        L_A, L_G = self._factorized(layer.name, self._damping(layer.name, self.damping))
        x, d = masked(written_out(layer, a), mask), masked(delta, mask)
        return _cholesky_rows(x, L_A), _cholesky_rows(d, L_G)

    def _queries_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> LayerQueries:
        if self.split == "none":
            own, value = self._eigen[layer.name], self._damping(layer.name, self.damping)
            return eigenbasis_queries(layer, a, delta, mask, own.U_A, own.U_G, self._regular(layer.name, value), value)
        return TokenQueries(*self._solved_tokens(layer, a, delta, mask))

    def _quadratic_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, power: int) -> Tensor:
        if self.split == "none":
            own, value = self._eigen[layer.name], self._damping(layer.name, self.damping)
            Lambda = self._regular(layer.name, value)
            return eigenbasis_quadratic(layer, a, delta, mask, own.U_A, own.U_G, Lambda, value, power)
        L_A, L_G = self._factorized(layer.name, self._damping(layer.name, self.damping))
        x, d = masked(written_out(layer, a), mask), masked(delta, mask)
        if power == 2:
            return ops.ghost_norm(_cholesky_rows(x, L_A), _cholesky_rows(d, L_G))
        return ops.ghost_norm(_half_rows(x, L_A), _half_rows(d, L_G))

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        return sums_state(self._sums) | eigen_state(self._eigen)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._take(*read_sums(self.model, read_state(state, state_shapes(self.model), "KFACIHVP")))


def _half_rows(x: Tensor, L: Tensor) -> Tensor:
    """Rows of x by L^-1: the squared norm of the result is x^T (L L^T)^-1 x."""
    half: Tensor = torch.linalg.solve_triangular(L, x.to(L.dtype).flatten(0, 1).T, upper=False)
    return half.T.reshape(x.shape)


def _cholesky_rows(x: Tensor, L: Tensor) -> Tensor:
    """Rows of x by (L L^T)^-1."""
    solved: Tensor = torch.cholesky_solve(x.to(L.dtype).flatten(0, 1).T, L)
    return solved.T.reshape(x.shape)
