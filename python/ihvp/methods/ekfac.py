"""F = (U_G (x) U_A) diag(Lambda) (U_G (x) U_A)^T for each layer, Lambda measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import FiniteChecks
from ihvp.capture import capture
from ihvp.methods.base import Vectors, batches, check_finite, check_layers, check_reached, read_state
from ihvp.methods.damping import Damping, check_regular, resolve_damping
from ihvp.methods.eigenbasis import eigenbasis_quadratic, eigenbasis_queries
from ihvp.methods.kronecker import (
    CovarianceSums,
    Eigen,
    InputGroups,
    KroneckerIHVP,
    add_covariances,
    eigen_state,
    eigendecompose,
    read_sums,
    state_shapes,
    sum_covariances,
    sums_state,
    target_generator,
)
from ihvp.methods.queries import LayerQueries, small_layers
from ihvp.model import InfluenceModel, Layer
from ihvp.ops._precision import float32_products


class EKFACIHVP(KroneckerIHVP):
    """Eigenvalue-corrected Kronecker-factored curvature. Passes over data: two, or one without `update_eigen`.

    The first pass sums A and G, whose eigenvectors make the basis; the second measures the curvature's diagonal in it,
    Lambda = mean over examples of (U_G^T g_n U_A)^2. Solving divides by Lambda + damping.

    Args:
        damping: a number >= 0, or "auto": 0.1 mean(Lambda) of the layer.
        update_eigen: False keeps Lambda = outer(lambda_G, lambda_A), which is KFAC undivided.
        fisher: "empirical" takes the data's own targets, "sampled" draws them from the model (seeded by `seed`).

    Attributes:
        kfac_blocks: layer name -> (A, G) in float64; evecs: -> (U_A, U_G); evals: -> Lambda (O,I').

    Source: George et al. 2018 (arXiv:1806.03884), eq. 8 and 9; Grosse et al. 2023 (arXiv:2308.03296), section 3.1.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 1e-3,
        update_eigen: bool = True,
        fisher: str = "empirical",
        *,
        seed: int = 0,
    ) -> None:
        self.update_eigen = update_eigen
        self._sum_Lambda: dict[str, Tensor] = {}
        self._examples = 0  # of Lambda
        self._Lambda: dict[str, Tensor] = {}
        self._bounds: dict[str, list[float]] = {}
        super().__init__(model, hessian_loader, damping, fisher, seed)

    def _config(self) -> dict[str, Any]:
        return {"damping": self.damping, "update_eigen": self.update_eigen, "fisher": self.fisher, "seed": self.seed}

    @property
    def is_fitted(self) -> bool:
        return bool(self._Lambda)

    def fit(self, loader: Iterable[Any], basis: KroneckerIHVP | None = None) -> EKFACIHVP:
        """Two passes over the data. A fitted KFAC or EKFAC object of the same layers as `basis` saves the first: its A
        and G are taken with their eigenvectors, so that Lambda alone is measured. Objects that have measured it on
        parts of the data in one basis can be merged.
        """
        if basis is None:
            sums = sum_covariances(self.model, loader, self.fisher, self.seed)
            eigen = eigendecompose(self.model, sums)
        else:
            sums, eigen = self._basis_of(basis)
        sum_Lambda, examples = self._sum_diagonals(loader, eigen) if self.update_eigen else ({}, 0)
        self._take(sums, eigen, sum_Lambda, examples)
        return self

    def _basis_of(self, basis: KroneckerIHVP) -> tuple[dict[str, CovarianceSums], dict[str, Eigen]]:
        if not isinstance(basis, KroneckerIHVP):
            raise TypeError(f"basis must be a KFACIHVP or EKFACIHVP, got {type(basis).__name__}")
        basis._check_fitted()
        check_layers("basis", basis.model, self.model)
        return read_sums(self.model, sums_state(basis._sums) | eigen_state(basis._eigen))

    def _merge(self, others: Sequence[EKFACIHVP]) -> None:
        parts = (self, *others)
        if not self.update_eigen:
            sums = add_covariances([own._sums for own in parts])
            self._take(sums, eigendecompose(self.model, sums), {}, 0)
            return
        sum_Lambda = {}
        for name, own in self._eigen.items():
            for i, other in enumerate(others):
                found = other._eigen[name]
                if not all(torch.equal(x, y.to(x)) for x, y in ((own.U_A, found.U_A), (own.U_G, found.U_G))):
                    raise ValueError(
                        f"layer {name!r}: others[{i}] measured Lambda in another eigenbasis; merge KFACIHVP objects "
                        "first, and fit each part with the result as basis"
                    )
            added = [part._sum_Lambda[name] for part in parts]
            sum_Lambda[name] = torch.stack([x.to(added[0].device) for x in added]).sum(0)
        self._take(self._sums, self._eigen, sum_Lambda, sum(part._examples for part in parts))

    def _sum_diagonals(self, loader: Iterable[Any], eigen: dict[str, Eigen]) -> tuple[dict[str, Tensor], int]:
        """The second pass: the sum over examples of (U_G^T g_n U_A)^2, in float64, and their number."""
        model = self.model
        sums = {
            name: torch.zeros(layer.shape, dtype=torch.float64, device=model.device)
            for name, layer in model.layers.items()
        }
        finite = FiniteChecks()
        generator = target_generator(self.fisher, self.seed)
        reached: set[str] = set()
        examples = 0
        for index, batch in batches(model, loader, "eigenvalues"):

            def take(group: list[tuple[Layer, Tensor]], a: Tensor, mask: Tensor | None, index: int = index) -> None:
                shared = _projected_once(group, a, mask, eigen)
                for layer, delta in group:
                    own, total = eigen[layer.name], sums[layer.name]
                    if shared is None:
                        ops.ekfac_diagonal_update_(total, a, delta, own.U_A, own.U_G, mask=mask, bias=layer.bias)
                    else:
                        d = ops.eigenbasis_project(delta, own.U_G, mask=mask)
                        ops.ekfac_diagonal_update_(total, shared, d, None, None)
                    check_finite(finite, layer, index, corrected_eigenvalues=total.sum())
                    reached.add(layer.name)

            groups = InputGroups(take)
            capture(model, batch, groups, index=index, generator=generator)
            groups.flush()
            finite.finish()
            examples += batch.size
        check_reached(model, reached)
        return sums, examples

    def _take(
        self,
        sums: dict[str, CovarianceSums],
        eigen: dict[str, Eigen],
        sum_Lambda: dict[str, Tensor],
        examples: int,
    ) -> None:
        dtype = self.model.dtype
        if self.update_eigen:
            Lambda = {name: (x / max(examples, 1)).to(dtype) for name, x in sum_Lambda.items()}
        else:
            Lambda = {name: torch.outer(own.values_G, own.values_A).to(dtype) for name, own in eigen.items()}
        # One transfer for all layers: each solve asks for them.
        bounds = torch.stack([torch.stack([x.mean(), x.min(), x.max()]) for x in Lambda.values()]).tolist()
        self._sums, self._eigen, self._Lambda = sums, eigen, Lambda
        self._sum_Lambda, self._examples = sum_Lambda, examples
        self._bounds = dict(zip(Lambda, bounds, strict=True))

    def _eigenvalues(self, name: str) -> Tensor:
        return self._Lambda[name]

    def _regular(self, name: str, damping: Damping) -> tuple[Eigen, Tensor, float]:
        """The layer's basis, Lambda and damping, after the check that Lambda + damping can be divided by."""
        mean, smallest, largest = self._bounds[name]
        value = resolve_damping(damping, name, mean)
        check_regular(f"layer {name!r}", smallest, largest, value)
        return self._eigen[name], self._Lambda[name], value

    def _solve(self, V: Vectors, damping: Damping) -> Vectors:
        """Small layers in one call."""
        small, dtype = small_layers(self.model), self.model.dtype
        group = {name: v for name, v in V.items() if name in small and v.dtype == dtype}
        solved = super()._solve({name: v for name, v in V.items() if name not in group}, damping)
        if group:
            own, Lambda, values = zip(*(self._regular(name, damping) for name in group), strict=True)
            U_A, U_G = [one.U_A for one in own], [one.U_G for one in own]
            P = ops.ekfac_solve_grouped(list(group.values()), U_A, U_G, Lambda, values)
            solved |= dict(zip(group, P, strict=True))
        return {name: solved[name] for name in V}

    def _solve_layer(self, name: str, V: Tensor, damping: Damping) -> Tensor:
        own, Lambda, value = self._regular(name, damping)
        return ops.ekfac_solve(V, own.U_A, own.U_G, Lambda, value)

    def _solve_several(self, V: Vectors, dampings: list[Damping]) -> Vectors:
        """All dampings share the rotation into the eigenbasis."""
        solutions = {}
        for name, v in V.items():
            own, values = self._eigen[name], [self._regular(name, damping)[2] for damping in dampings]
            solutions[name] = ops.ekfac_solve(v, own.U_A, own.U_G, self._Lambda[name], values)
        return solutions

    def _multiply(self, V: Vectors) -> Vectors:
        products = {}
        for name, v in V.items():
            own = self._eigen[name]
            rotated = ops.eigenbasis_rotate(v, own.U_A, own.U_G) * self._Lambda[name]
            products[name] = ops.eigenbasis_rotate(rotated, own.U_A, own.U_G, inverse=True)
        return products

    def _queries_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> LayerQueries:
        own, Lambda, value = self._regular(layer.name, self.damping)
        return eigenbasis_queries(layer, a, delta, mask, own.U_A, own.U_G, Lambda, value)

    def _quadratic_layer(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, power: int) -> Tensor:
        own, Lambda, value = self._regular(layer.name, self.damping)
        return eigenbasis_quadratic(layer, a, delta, mask, own.U_A, own.U_G, Lambda, value, power)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        state = sums_state(self._sums) | eigen_state(self._eigen)
        if self.update_eigen:
            state |= {f"{name}/sum_Lambda": x for name, x in self._sum_Lambda.items()}
            state["examples"] = torch.tensor(self._examples)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shapes = state_shapes(self.model)
        if self.update_eigen:
            shapes |= {f"{name}/sum_Lambda": layer.shape for name, layer in self.model.layers.items()}
            shapes["examples"] = ()
        own = read_state(state, shapes, "EKFACIHVP")
        diagonals = {
            name: own[f"{name}/sum_Lambda"].to(self.model.device) for name in self.model.layers if self.update_eigen
        }
        self._take(*read_sums(self.model, own), diagonals, int(own["examples"]) if self.update_eigen else 0)


def _projected_once(
    group: list[tuple[Layer, Tensor]], a: Tensor, mask: Tensor | None, eigen: dict[str, Eigen]
) -> Tensor | None:
    """The input of several layers in the basis that they share, where that costs less than a rotation for each, of
    tokens or of gradients. Kernels on GPUs, and those of 16-bit integers, rotate faster than this product: None."""
    first, T = group[0][0], a.shape[1]
    U_A, I = eigen[first.name].U_A, first.shape[1]
    if (
        len(group) == 1
        or a.is_cuda
        or float32_products() != "float32"
        or any(eigen[layer.name].U_A is not U_A for layer, _ in group)
    ):
        return None
    outputs = [layer.shape[0] for layer, _ in group]
    if T * (I * I + sum(O * O for O in outputs)) > sum(min(T * (I * I + O * O), O * I * (O + I)) for O in outputs):
        return None
    return ops.eigenbasis_project(a, U_A, mask=mask, bias=first.bias)
