"""The Hessian or Gauss-Newton matrix itself, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ihvp.batch import Batch
from ihvp.capture import untouched
from ihvp.methods.base import IHVP, Damping, Vectors, batches, read_state, resolve_damping
from ihvp.methods.full import flatten, unflatten
from ihvp.methods.kronecker import symmetric_part
from ihvp.model import InfluenceModel

CURVATURES = ("hessian", "gauss_newton")
CHUNK = 256  # directions differentiated at once


class ExactIHVP(IHVP):
    """The mean Hessian, or J^T H_outputs J (Gauss-Newton), over all tracked parameters. Passes over data: one.

    The p x p matrix is summed and diagonalised in float64: for tests and small models. A Hessian may have negative
    eigenvalues; the system is solved as it stands.

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue.
        curvature: "hessian" or "gauss_newton"; the latter needs a net that returns one tensor.
        rcond: None refuses a singular system. A number takes the pseudo-inverse, in which eigenvalues of magnitude up
            to rcond times the largest count as infinite.
        train_hessian: a (p,p) matrix to take instead of fitting, its parameters in the order of the layers, each
            (O,I') row by row.

    Source: Koh and Liang 2017 (arXiv:1703.04730), eq. 2; Martens 2020 (arXiv:1412.1193), section 8 for Gauss-Newton.
    """

    def __init__(
        self,
        model: InfluenceModel,
        hessian_loader: Iterable[Any] | None = None,
        damping: Damping = 0.0,
        curvature: str = "hessian",
        *,
        rcond: float | None = None,
        train_hessian: Tensor | None = None,
    ) -> None:
        p = model.nb_params if isinstance(model, InfluenceModel) else 0
        if train_hessian is not None and tuple(train_hessian.shape) != (p, p):
            raise ValueError(f"train_hessian (p,p) must be {(p, p)}, got {tuple(train_hessian.shape)}")
        if curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}, got {curvature!r}")
        if rcond is not None and not 0 <= rcond < 1:
            raise ValueError(f"rcond must be in [0, 1), got {rcond}")
        if train_hessian is not None and hessian_loader is not None:
            raise ValueError("give hessian_loader or train_hessian, not both")
        self.curvature = curvature
        self.rcond = rcond
        self._matrix: Tensor | None = None
        self._values: Tensor | None = None
        self._vectors: Tensor | None = None
        super().__init__(model, hessian_loader, damping)
        if train_hessian is not None:
            self.load_state_dict({"matrix": train_hessian})

    def _config(self) -> dict[str, Any]:
        return {"damping": self.damping, "curvature": self.curvature, "rcond": self.rcond}

    @property
    def is_fitted(self) -> bool:
        return self._matrix is not None

    def fit(self, loader: Iterable[Any]) -> ExactIHVP:
        model = self.model
        with torch.inference_mode(False):
            total = torch.zeros(model.nb_params, model.nb_params, dtype=torch.float64, device=model.device)
        examples = 0
        add = _add_hessian if self.curvature == "hessian" else _add_gauss_newton
        for index, batch in batches(model, loader, self.curvature):
            with torch.inference_mode(False), torch.enable_grad(), untouched(model.net):
                for p in model.net.parameters():
                    p.requires_grad_(False)
                add(total, model, batch.outside_inference())
            if not bool(total.diagonal().sum().isfinite()):
                raise FloatingPointError(f"the {self.curvature} of batch {index} is not finite")
            examples += batch.size
        self._take(total / examples)
        return self

    def _take(self, matrix: Tensor) -> None:
        matrix = symmetric_part(matrix, f"the {self.curvature}")
        values, vectors = torch.linalg.eigh(matrix)
        self._matrix, self._values, self._vectors = matrix, values, vectors

    def _solve(self, V: Vectors, damping: Damping) -> Vectors:
        assert self._values is not None and self._vectors is not None
        value = resolve_damping(damping, "full", float(self._values.mean()))
        shifted = self._values + value
        largest, smallest = float(shifted.abs().max()), float(shifted.abs().min())
        # Undamped, zero eigenvalues come out as large as the derivatives' rounding.
        rounding = torch.finfo(self.model.dtype if value == 0 else torch.float64).eps * len(shifted)
        cut = (rounding if self.rcond is None else self.rcond) * largest
        kept = shifted.abs() > cut
        if self.rcond is None and not bool(kept.all()):
            raise torch.linalg.LinAlgError(
                f"the {self.curvature} with damping {value:.3g} is singular: its smallest eigenvalue is {smallest:.3g} "
                f"in magnitude, its largest {largest:.3g}; a larger damping helps, or rcond for the pseudo-inverse"
            )
        inverse = torch.where(kept, 1 / torch.where(kept, shifted, 1.0), 0.0)
        solution = (flatten(V) @ self._vectors * inverse) @ self._vectors.T
        return unflatten(self.model, solution, self.model.dtype)

    def _multiply(self, V: Vectors) -> Vectors:
        assert self._matrix is not None
        return unflatten(self.model, flatten(V) @ self._matrix, self.model.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        assert self._matrix is not None
        return {"matrix": self._matrix}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        p = self.model.nb_params
        self._take(read_state(state, {"matrix": (p, p)}, "ExactIHVP")["matrix"].to(self.model.device, torch.float64))


def _parameters(model: InfluenceModel) -> tuple[Tensor, Callable[[Tensor], dict[str, Tensor]]]:
    """All tracked parameters as one vector (p,), and the way back to parameters by name."""
    matrices = {name: layer.matrix() for name, layer in model.layers.items()}
    sizes = [m.numel() for m in matrices.values()]

    def by_name(flat: Tensor) -> dict[str, Tensor]:
        parts = zip(model.layers.values(), flat.split(sizes), strict=True)
        return {key: p for layer, part in parts for key, p in layer.split(part.view(layer.shape)).items()}

    return torch.cat([m.flatten() for m in matrices.values()]), by_name


def _add_hessian(total: Tensor, model: InfluenceModel, batch: Batch) -> None:
    """total += sum_n of the Hessian of the loss: its rows by reverse over reverse differentiation."""
    theta, by_name = _parameters(model)

    def loss(flat: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model.net, by_name(flat), batch.args, dict(batch.kwargs))
        return model.losses(outputs, batch, batch.targets).sum()

    pull_back = torch.func.vjp(torch.func.grad(loss), theta)[1]
    for start in range(0, len(theta), CHUNK):
        rows = torch.arange(start, min(start + CHUNK, len(theta)), device=theta.device)
        directions = torch.nn.functional.one_hot(rows, len(theta)).to(theta.dtype)
        (products,) = torch.vmap(pull_back, randomness="same")(directions)
        total[rows] += products.double()


def _add_gauss_newton(total: Tensor, model: InfluenceModel, batch: Batch) -> None:
    """total += sum_n J_n^T H_n J_n, J_n the Jacobian of the outputs, H_n the Hessian of the loss in the outputs."""
    theta, by_name = _parameters(model)

    def forward(flat: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model.net, by_name(flat), batch.args, dict(batch.kwargs))
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f'curvature="gauss_newton" needs a net that returns one tensor, got {type(outputs).__name__}'
            )
        return outputs

    pulled = torch.func.vjp(forward, theta)
    outputs, pull_back = pulled[0], pulled[1]
    leaf = outputs.detach().requires_grad_()
    first = torch.autograd.grad(model.losses(leaf, batch, batch.targets).sum(), leaf, create_graph=True)[0]
    first = first.flatten(1) if first.dim() > 1 else first.unsqueeze(1)
    N, K = first.shape
    H = torch.zeros(N, K, K, dtype=torch.float64, device=theta.device)
    for k in range(K):
        if first.requires_grad:
            row = torch.autograd.grad(first[:, k].sum(), leaf, retain_graph=True, allow_unused=True)[0]
            if row is not None:
                H[:, k] = row.reshape(N, K)
    step = max(1, CHUNK // K)
    for n in range(0, N, step):
        count = min(step, N - n)
        seeds = torch.zeros(count * K, N, K, dtype=outputs.dtype, device=theta.device)
        rows = torch.arange(count * K, device=theta.device)
        seeds[rows, n + rows // K, rows % K] = 1
        (jacobian,) = torch.vmap(pull_back, randomness="same")(seeds.view(count * K, *outputs.shape))
        J = jacobian.double().view(count, K, -1)
        total += J.flatten(0, 1).T @ (H[n : n + count] @ J).flatten(0, 1)
