"""F = diag of the Fisher matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import FiniteChecks
from ihvp.capture import capture
from ihvp.methods.base import LayerwiseIHVP, Vectors, batches, check_finite, check_reached, read_state
from ihvp.methods.damping import Damping, check_regular, resolve_damping
from ihvp.methods.eigenbasis import eigenbasis_quadratic
from ihvp.methods.kronecker import check_fisher, target_generator
from ihvp.model import InfluenceModel, Layer


class DiagonalIHVP(LayerwiseIHVP):
    """The Fisher matrix's diagonal, mean over examples of g_n^2 elementwise. Passes over data: one.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean of the layer's diagonal.
        fisher: "empirical" takes the data's own targets, "sampled" draws them from the model (seeded by `seed`).

    Attributes:
        evals: layer name -> the diagonal (O,I').

    Source: Kirkpatrick et al. 2017 (arXiv:1612.00796), section 2.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        fisher: str = "empirical",
        *,
        seed: int = 0,
    ) -> None:
        check_fisher(fisher)
        self.fisher = fisher
        self.seed = seed
        self._sums: dict[str, Tensor] = {}
        self._examples = 0
        super().__init__(model, hessian_loader, damping)

    def _config(self) -> dict[str, Any]:
        return {"damping": self.damping, "fisher": self.fisher, "seed": self.seed}

    @property
    def is_fitted(self) -> bool:
        return bool(self._sums)

    def fit(self, loader: Iterable[Any]) -> DiagonalIHVP:
        model = self.model
        sums = {
            name: torch.zeros(layer.shape, dtype=torch.float64, device=model.device)
            for name, layer in model.layers.items()
        }
        finite = FiniteChecks()
        generator = target_generator(self.fisher, self.seed)
        examples = 0
        reached: set[str] = set()
        for index, batch in batches(model, loader, "diagonal"):

            def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, index: int = index) -> None:
                total = sums[layer.name]
                ops.ekfac_diagonal_update_(total, a, delta, None, None, mask=mask, bias=layer.bias)
                check_finite(finite, layer, index, diagonal=total.sum())
                reached.add(layer.name)

            capture(model, batch, sink, index=index, generator=generator)
            finite.finish()
            examples += batch.size
        check_reached(model, reached)
        self._sums, self._examples = sums, examples
        return self

    def _merge(self, others: Sequence[DiagonalIHVP]) -> None:
        parts = (self, *others)
        self._sums = {
            name: torch.stack([part._sums[name].to(x.device) for part in parts]).sum(0)
            for name, x in self._sums.items()
        }
        self._examples = sum(part._examples for part in parts)

    @property
    def evals(self) -> dict[str, Tensor]:
        self._check_fitted()
        return {name: (x / self._examples).to(self.model.dtype) for name, x in self._sums.items()}

    def _regular(self, name: str, damping: Damping) -> tuple[Tensor, float]:
        diagonal = (self._sums[name] / self._examples).to(self.model.dtype)
        value = resolve_damping(damping, name, float(diagonal.mean()))
        check_regular(f"layer {name!r}", float(diagonal.min()), float(diagonal.max()), value)
        return diagonal, value

    def _solve_layer(self, name: str, V: Tensor, damping: Damping) -> Tensor:
        diagonal, value = self._regular(name, damping)
        return V / (diagonal + value)

    def _multiply(self, V: Vectors) -> Vectors:
        evals = self.evals
        return {name: v * evals[name] for name, v in V.items()}

    def _quadratic_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, power: int) -> Tensor:
        diagonal, value = self._regular(layer.name, self.damping)
        return eigenbasis_quadratic(layer, a, delta, mask, None, None, diagonal, value, power)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        return {f"{name}/sum": x for name, x in self._sums.items()} | {"examples": torch.tensor(self._examples)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shapes: dict[str, tuple[int, ...]] = {f"{name}/sum": layer.shape for name, layer in self.model.layers.items()}
        own = read_state(state, shapes | {"examples": ()}, "DiagonalIHVP")
        self._sums = {name: own[f"{name}/sum"].to(self.model.device) for name in self.model.layers}
        self._examples = int(own["examples"])
