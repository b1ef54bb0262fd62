"""F = (1/N) sum_n g_n g_n^T over all tracked parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ihvp import ops
from ihvp.capture import capture
from ihvp.methods.base import IHVP, Damping, Vectors, batches, check_reached, resolve_damping
from ihvp.methods.full import flatten, unflatten
from ihvp.methods.kronecker import check_fisher, target_generator
from ihvp.methods.queries import masked, written_out
from ihvp.model import InfluenceModel, Layer

Tokens = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> x (N,T,I') with the bias feature written out, d (N,T,O), both zero where masked."""


class FisherIHVP(IHVP):
    """The Fisher matrix itself, all layers and their interactions. Passes over data: one.

    While there are fewer examples than parameters p, the examples' tokens are kept and systems are solved by the
    N x N kernel K = G G^T, by Woodbury: (F + damping I)^-1 v = (v - G^T (K + N damping I)^-1 G v) / damping, where row
    n of G is g_n, never formed. From N = p on, the p x p matrix is summed instead. Both solve by Cholesky in float64;
    Woodbury's subtraction loses digits at tiny dampings (1e-9 relative at 1e-7 of the largest eigenvalue).

    Args:
        damping: a number >= 0, or "auto": 0.1 times the mean eigenvalue of F.
        fisher: "empirical" takes the data's own targets, "sampled" draws them from the model (seeded by `seed`).

    Source: Koh and Liang 2017 (arXiv:1703.04730) with the Fisher of Martens 2020 (arXiv:1412.1193), section 9.
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
        self._examples = 0
        self._sum: Tensor | None = None  # sum_n g_n g_n^T (p,p), or
        self._tokens: Tokens = {}  # the examples, and
        self._kernel: Tensor | None = None  # K (N,N)
        self._factors: dict[float, Tensor] = {}
        super().__init__(model, hessian_loader, damping)

    def _config(self) -> dict[str, Any]:
        return {"damping": self.damping, "fisher": self.fisher, "seed": self.seed}

    @property
    def is_fitted(self) -> bool:
        return self._examples > 0

    def fit(self, loader: Iterable[Any]) -> FisherIHVP:
        model = self.model
        generator = target_generator(self.fisher, self.seed)
        kept: list[Tokens] = []
        total: Tensor | None = None
        examples = 0
        reached: set[str] = set()
        for index, batch in batches(model, loader, "Fisher"):
            own: Tokens = {}

            def sink(layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, own: Tokens = own) -> None:
                own[layer.name] = (masked(written_out(layer, a), mask), masked(delta, mask))

            capture(model, batch, sink, index=index, generator=generator)
            reached |= set(own)
            for name, layer in model.layers.items():
                if name not in own:
                    O, I = layer.shape
                    zeros = torch.zeros(batch.size, 1, O + I, dtype=model.dtype, device=model.device)
                    own[name] = (zeros[..., :I], zeros[..., I:])
            kept.append({name: own[name] for name in model.layers})
            examples += batch.size
            if examples >= model.nb_params:
                if total is None:
                    total = torch.zeros(model.nb_params, model.nb_params, dtype=torch.float64, device=model.device)
                while kept:
                    g = flatten({name: ops.per_sample_gradient(x, d) for name, (x, d) in kept.pop().items()})
                    total += g.T @ g
        check_reached(model, reached)
        self._take(examples, total, _joined(kept) if kept else {})
        return self

    def _take(self, examples: int, total: Tensor | None, tokens: Tokens) -> None:
        kernel = None
        if tokens:
            wide = {name: (x.double(), d.double()) for name, (x, d) in tokens.items()}
            kernel = torch.stack([ops.ghost_dot(x, d, x, d) for x, d in wide.values()]).sum(0)
        self._examples, self._sum, self._tokens, self._kernel, self._factors = examples, total, tokens, kernel, {}

    def _damping(self, damping: Damping) -> float:
        trace = self._sum if self._sum is not None else self._kernel
        assert trace is not None
        return resolve_damping(damping, "full", float(trace.trace()) / self._examples / self.model.nb_params)

    def _factor(self, damping: float) -> Tensor:
        """Cholesky factor of F + damping I, or of K + N damping I."""
        if damping not in self._factors:
            if self._sum is not None:
                matrix = self._sum / self._examples
                matrix.diagonal().add_(damping)
            else:
                assert self._kernel is not None
                if damping == 0:
                    raise torch.linalg.LinAlgError(
                        f"the Fisher matrix of {self._examples} examples and {self.model.nb_params} parameters is "
                        "singular; it needs a positive damping"
                    )
                matrix = self._kernel.clone()
                matrix.diagonal().add_(damping * self._examples)
            L, info = torch.linalg.cholesky_ex(matrix)
            smallest = float(L.diagonal().min()) ** 2
            if int(info) or not smallest > len(matrix) * torch.finfo(torch.float64).eps * float(
                matrix.diagonal().max()
            ):
                raise torch.linalg.LinAlgError(
                    f"the Fisher matrix with damping {damping:.3g} is singular: its smallest pivot is {smallest:.3g}; "
                    "a larger damping helps"
                )
            if len(self._factors) >= 4:  # of a few dampings at a time
                self._factors.clear()
            self._factors[damping] = L
        return self._factors[damping]

    def _solve(self, V: Vectors, damping: Damping) -> Vectors:
        value = self._damping(damping)
        L = self._factor(value)
        if self._sum is not None:
            solution = torch.cholesky_solve(flatten(V).T, L).T
            return unflatten(self.model, solution, self.model.dtype)
        coefficients = torch.cholesky_solve(self._gradient_dots(V).T, L).T
        correction = self._gradient_sum(coefficients)
        return {name: ((v.double() - correction[name]) / value).to(self.model.dtype) for name, v in V.items()}

    def _multiply(self, V: Vectors) -> Vectors:
        if self._sum is not None:
            return unflatten(self.model, flatten(V) @ self._sum / self._examples, self.model.dtype)
        product = self._gradient_sum(self._gradient_dots(V) / self._examples)
        return {name: product[name].to(self.model.dtype) for name in V}

    def _gradient_dots(self, V: Vectors) -> Tensor:
        """G v, (Q,N)."""
        dots = [ops.gradient_dot(V[name].double(), x.double(), d.double()) for name, (x, d) in self._tokens.items()]
        return torch.stack(dots).sum(0)

    def _gradient_sum(self, c: Tensor) -> Vectors:
        """G^T c = sum_n c[q,n] g_n for c (Q,N), one query at a time: delta^T diag(c) a."""
        result = {}
        for name, (x, d) in self._tokens.items():
            rows_x, wide_d = x.double().flatten(0, 1), d.double()
            sums = [(wide_d * weights.view(-1, 1, 1)).flatten(0, 1).T @ rows_x for weights in c]
            result[name] = torch.stack(sums) if sums else rows_x.new_zeros(0, d.shape[2], x.shape[2])
        return result

    def state_dict(self) -> dict[str, Tensor]:
        self._check_fitted()
        state = {"examples": torch.tensor(self._examples)}
        if self._sum is not None:
            return state | {"sum": self._sum}
        for name, (x, d) in self._tokens.items():
            state |= {f"{name}/x": x, f"{name}/d": d}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        model = self.model
        if "examples" not in state or state["examples"].numel() != 1:
            raise ValueError("FisherIHVP: the state has no 'examples'; it is of another method")
        N = int(state["examples"])
        keys = (
            {"examples", "sum"} if "sum" in state else {"examples", *(f"{n}/{k}" for n in model.layers for k in "xd")}
        )
        shapes = {key: tuple(state[key].shape) for key in state}
        fits = keys == set(state)
        if fits and "sum" in state:
            fits = shapes["sum"] == (model.nb_params, model.nb_params)
        elif fits:
            for name, layer in model.layers.items():
                x, d = shapes[f"{name}/x"], shapes[f"{name}/d"]
                fits = fits and len(x) == len(d) == 3 and x[:2] == d[:2] and (d[2], x[2]) == layer.shape and x[0] == N
        if not fits:
            expected = {name: layer.shape for name, layer in model.layers.items()}
            raise ValueError(
                f"FisherIHVP: the state is of another model; expected layers (O,I') {expected}, got {shapes}"
            )
        own = {key: x.to(model.device, copy=True) for key, x in state.items()}
        tokens = {} if "sum" in own else {name: (own[f"{name}/x"], own[f"{name}/d"]) for name in model.layers}
        self._take(N, own.get("sum"), tokens)


def _joined(kept: list[Tokens]) -> Tokens:
    """All batches as one, shorter ones padded with zero positions."""
    result = {}
    for name in kept[0]:
        longest = max(part[name][0].shape[1] for part in kept)
        pad = [tuple(torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in part[name]) for part in kept]
        result[name] = (torch.cat([x for x, _ in pad]), torch.cat([d for _, d in pad]))
    return result
