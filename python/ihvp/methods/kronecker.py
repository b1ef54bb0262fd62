"""What KFAC and EKFAC share: the covariance sums, their eigendecomposition, the Fisher's choice of targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import FiniteChecks, all_finite
from ihvp.capture import capture
from ihvp.methods.base import LayerwiseIHVP, batches, check_finite, check_reached
from ihvp.methods.damping import Damping
from ihvp.model import InfluenceModel, Layer

FISHERS = ("empirical", "sampled")


@dataclass
class CovarianceSums:
    """Raw sums over the data and their counts: A = sum_A / positions, G = sum_G / examples."""

    sum_A: Tensor
    sum_G: Tensor
    positions: int
    examples: int

    @property
    def A(self) -> Tensor:
        return moment(self.sum_A, self.positions)

    @property
    def G(self) -> Tensor:
        return moment(self.sum_G, self.examples)


def moment(total: Tensor, count: int) -> Tensor:
    return total / max(count, 1)


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues ascending, not negative, in float64; eigenvectors in columns, in the model's dtype."""

    values_A: Tensor
    values_G: Tensor
    U_A: Tensor
    U_G: Tensor


class KroneckerIHVP(LayerwiseIHVP):
    """What KFAC and EKFAC objects hold: the covariance sums and their eigendecomposition, by layer."""

    def __init__(
        self, model: InfluenceModel, hessian_loader: Iterable[Any] | None, damping: Damping, fisher: str, seed: int
    ) -> None:
        check_fisher(fisher)
        self.fisher = fisher
        self.seed = seed
        self._sums: dict[str, CovarianceSums] = {}
        self._eigen: dict[str, Eigen] = {}
        super().__init__(model, hessian_loader, damping)

    @property
    def kfac_blocks(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (A, G), in float64."""
        self._check_fitted()
        return {name: (own.A, own.G) for name, own in self._sums.items()}

    @property
    def evecs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name -> (U_A, U_G), eigenvectors in columns."""
        self._check_fitted()
        return {name: (own.U_A, own.U_G) for name, own in self._eigen.items()}

    @property
    def evals(self) -> dict[str, Tensor]:
        """Layer name -> eigenvalues (O,I') in that basis."""
        self._check_fitted()
        return {name: self._eigenvalues(name) for name in self._eigen}

    @abstractmethod
    def _eigenvalues(self, name: str) -> Tensor: ...


def check_fisher(fisher: str) -> None:
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {fisher!r}")


def target_generator(fisher: str, seed: int) -> torch.Generator | None:
    """For fisher="sampled" a fresh generator: every pass of a fit draws the same targets."""
    return torch.Generator().manual_seed(seed) if fisher == "sampled" else None


@dataclass
class InputGroups:
    """A sink that hands on together the layers that read one input, one after another, as a transformer's queries, keys
    and values do: what depends on the input alone is then computed once. `flush` hands on the last of them.
    """

    take: Callable[[list[tuple[Layer, Tensor]], Tensor, Tensor | None], None]
    """Receives [(layer, delta), ...], their a and mask; either all layers have a bias or none."""
    _group: list[tuple[Layer, Tensor]] = field(default_factory=list)
    _input: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        if self._input is not None:
            known, known_mask = self._input
            alike = same_memory(known, a) and known_mask is mask and self._group[0][0].bias == layer.bias
            if not alike:
                self.flush()
        self._input = a, mask
        self._group.append((layer, delta))

    def flush(self) -> None:
        if self._input is not None:
            group, (a, mask) = self._group, self._input
            self._group, self._input = [], None
            self.take(group, a, mask)


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors, both alive, are the same numbers."""
    return (x.data_ptr(), x.dtype, x.shape, x.stride()) == (y.data_ptr(), y.dtype, y.shape, y.stride())


def sum_covariances(model: InfluenceModel, loader: Iterable[Any], fisher: str, seed: int) -> dict[str, CovarianceSums]:
    """One pass over the data: the sums of every layer. Layers that always read the same input have one sum of it."""
    sums_A: dict[tuple[str, ...], Tensor] = {}
    sums_G = {name: _zeros(layer.shape[0], model.device) for name, layer in model.layers.items()}
    positions: dict[str, int] = dict.fromkeys(model.layers, 0)
    examples = 0
    finite = FiniteChecks()
    generator = target_generator(fisher, seed)
    for index, batch in batches(model, loader, "covariances"):

        def take(group: list[tuple[Layer, Tensor]], a: Tensor, mask: Tensor | None, index: int = index) -> None:
            first, names = group[0][0], tuple(layer.name for layer, _ in group)
            if names not in sums_A:
                sums_A[names] = _zeros(first.shape[1], model.device)
            ops.covariance_update_(sums_A[names], a, mask=mask, bias=first.bias)
            check_finite(finite, first, index, activation_second_moment=sums_A[names].diagonal())
            count = a.shape[0] * a.shape[1] if mask is None else int(mask.sum())
            for layer, delta in group:
                ops.covariance_update_(sums_G[layer.name], delta, mask=mask)
                check_finite(finite, layer, index, gradient_second_moment=sums_G[layer.name].diagonal())
                positions[layer.name] += count

        groups = InputGroups(take)
        capture(model, batch, groups, index=index, generator=generator)
        groups.flush()
        finite.finish()
        examples += batch.size
    check_reached(model, {name for names in sums_A for name in names})

    def sum_A(name: str) -> Tensor:
        own = [total for names, total in sums_A.items() if name in names]
        return own[0] if len(own) == 1 else torch.stack(own).sum(0)

    return {name: CovarianceSums(sum_A(name), sums_G[name], positions[name], examples) for name in model.layers}


def add_covariances(parts: Sequence[dict[str, CovarianceSums]]) -> dict[str, CovarianceSums]:
    """Those of all the data, from those of its parts. Layers that share a sum in every part share the result."""
    made: dict[tuple[int, ...], Tensor] = {}

    def add(own: Sequence[Tensor]) -> Tensor:
        key = tuple(map(id, own))
        if key not in made:
            made[key] = torch.stack([x.to(own[0].device) for x in own]).sum(0)
        return made[key]

    result = {}
    for name in parts[0]:
        own = [part[name] for part in parts]
        positions, examples = sum(one.positions for one in own), sum(one.examples for one in own)
        result[name] = CovarianceSums(
            add([one.sum_A for one in own]), add([one.sum_G for one in own]), positions, examples
        )
    return result


def _zeros(d: int, device: torch.device) -> Tensor:
    return torch.zeros(d, d, dtype=torch.float64, device=device)


def eigendecompose(model: InfluenceModel, sums: dict[str, CovarianceSums]) -> dict[str, Eigen]:
    """Layers that read the same input, as a transformer's queries, keys and values do, have the same sum to the bit:
    it is diagonalised once."""
    known: dict[tuple[int, int, float], list[tuple[Tensor, tuple[Tensor, Tensor]]]] = {}
    dtype = model.dtype

    def eigen_of(total: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
        alike = known.setdefault((len(total), count, float(total.trace())), [])
        for other, found in alike:
            if torch.equal(total, other):
                return found
        values, vectors = symmetric_eigen(moment(total, count), what)
        alike.append((total, (values, vectors.to(dtype))))
        return alike[-1][1]

    eigen = {}
    for name, own in sums.items():
        A, G = f"layer {name!r}: the activation second moment A", f"layer {name!r}: the gradient second moment G"
        values_A, U_A = eigen_of(own.sum_A, own.positions, A)
        values_G, U_G = eigen_of(own.sum_G, own.examples, G)
        eigen[name] = Eigen(values_A, values_G, U_A, U_G)
    return eigen


def symmetric_eigen(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors of a positive semidefinite matrix, in float64.

    When LAPACK gives up, the matrix is tried again with a jitter of 1e-12 of its mean diagonal, then on the CPU.

    Raises FloatingPointError when the matrix is not finite, torch.linalg.LinAlgError when every try failed.
    """
    matrix = symmetric_part(matrix, what)
    scale = matrix.diagonal().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    scaled = matrix / scale
    failure: Exception | None = None
    for attempt in (lambda x: x, jittered, lambda x: jittered(x).cpu()):
        try:
            values, vectors = torch.linalg.eigh(attempt(scaled))
        except torch.linalg.LinAlgError as error:
            failure = error
            continue
        return (values.clamp_min(0) * scale.to(values.device)).to(matrix.device), vectors.to(matrix.device)
    raise torch.linalg.LinAlgError(f"{what} {tuple(matrix.shape)} could not be diagonalised: {failure}")


def jittered(matrix: Tensor) -> Tensor:
    jitter = 1e-12 * matrix.diagonal().mean()
    return matrix + jitter * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def symmetric_part(matrix: Tensor, what: str) -> Tensor:
    """(M + M^T) / 2 in float64. Raises FloatingPointError when M is not finite."""
    matrix = matrix.double()
    if not all_finite(matrix):
        raise FloatingPointError(f"{what} is not finite")
    return (matrix + matrix.T) / 2


def sums_state(sums: dict[str, CovarianceSums]) -> dict[str, Tensor]:
    state = {}
    for name, own in sums.items():
        state[f"{name}/sum_A"], state[f"{name}/sum_G"] = own.sum_A, own.sum_G
        state[f"{name}/counts"] = torch.tensor([own.positions, own.examples])
    return state


def eigen_state(eigen: dict[str, Eigen]) -> dict[str, Tensor]:
    keys = ("values_A", "values_G", "U_A", "U_G")
    return {f"{name}/{key}": getattr(own, key) for name, own in eigen.items() for key in keys}


def state_shapes(model: InfluenceModel) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in model.layers.items():
        O, I = layer.shape
        shapes |= {
            f"{name}/sum_A": (I, I),
            f"{name}/sum_G": (O, O),
            f"{name}/counts": (2,),
            f"{name}/values_A": (I,),
            f"{name}/values_G": (O,),
            f"{name}/U_A": (I, I),
            f"{name}/U_G": (O, O),
        }
    return shapes


def read_sums(model: InfluenceModel, state: dict[str, Tensor]) -> tuple[dict[str, CovarianceSums], dict[str, Eigen]]:
    sums, eigen = {}, {}
    for name in model.layers:
        own = {
            key: state[f"{name}/{key}"].to(model.device)
            for key in ("sum_A", "sum_G", "values_A", "values_G", "U_A", "U_G")
        }
        positions, examples = state[f"{name}/counts"].tolist()
        sums[name] = CovarianceSums(own["sum_A"], own["sum_G"], positions, examples)
        eigen[name] = Eigen(own["values_A"], own["values_G"], own["U_A"].to(model.dtype), own["U_G"].to(model.dtype))
    return sums, eigen
