"""Preconditioned queries P in the cheapest form that scores: dense, of low rank, or tokens, also in the eigenbasis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ihvp import ops
from ihvp.batch import all_finite
from ihvp.model import InfluenceModel, Layer

NARROW = 128  # the widest side of a small layer
MANY = 8  # fewer small layers are not worth collecting
WHOLE = slice(None)
OVERSAMPLING = 8  # directions beyond the rank in which it is looked for


def small_layers(model: InfluenceModel) -> frozenset[str]:
    """The layers whose own work is less than that of calling for it: they are solved and scored many at a time.

    Adapters above all. Their queries are kept dense. None when there are too few of them.
    """
    small = frozenset(name for name, layer in model.layers.items() if max(layer.shape) <= NARROW)
    return small if len(small) >= MANY else frozenset()


class LayerQueries(ABC):
    """One layer's part of Q preconditioned queries."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Q."""

    @abstractmethod
    def scores(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, *, per_token: bool = False) -> Tensor:
        """(Q,N): <P_q, g_n>; with `per_token` its terms (Q,N,T)."""

    @abstractmethod
    def dense(self, at: slice = WHOLE) -> Tensor:
        """P itself, (Q,O,I'), or that of the queries `at`."""

    @abstractmethod
    def joined(self, others: Sequence[LayerQueries]) -> LayerQueries:
        """This and others of its own class along Q."""


Queries = dict[str, LayerQueries]
"""Layer name -> its part of the queries."""


def concatenate_queries(parts: Sequence[Queries]) -> Queries:
    """Along Q. Parts of different forms meet as dense ones."""
    result: Queries = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        if len(own) == 1:
            result[name] = first
        elif all(type(one) is type(first) for one in own):
            result[name] = first.joined(own[1:])
        else:
            result[name] = DenseQueries(torch.cat([one.dense() for one in own]))
    return result


@dataclass
class DenseQueries(LayerQueries):
    """P in memory: Q O I' numbers."""

    P: Tensor

    @property
    def size(self) -> int:
        return self.P.shape[0]

    def scores(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, *, per_token: bool = False) -> Tensor:
        return ops.gradient_dot(self.P, a, delta, mask=mask, bias=layer.bias, per_token=per_token)

    def dense(self, at: slice = WHOLE) -> Tensor:
        return self.P[at]

    def joined(self, others: Sequence[LayerQueries]) -> LayerQueries:
        return DenseQueries(torch.cat([self.P, *(one.dense() for one in others)]))


@dataclass
class LowRankQueries(LayerQueries):
    """P_q = L_q R_q, L (Q,O,r) and R (Q,r,I')."""

    L: Tensor
    R: Tensor

    @property
    def size(self) -> int:
        return self.L.shape[0]

    def scores(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, *, per_token: bool = False) -> Tensor:
        return ops.gradient_dot_low_rank(self.L, self.R, a, delta, mask=mask, bias=layer.bias, per_token=per_token)

    def dense(self, at: slice = WHOLE) -> Tensor:
        return self.L[at] @ self.R[at]

    def joined(self, others: Sequence[LayerQueries]) -> LayerQueries:
        own = [self, *(one for one in others if isinstance(one, LowRankQueries))]
        rank = max(one.R.shape[1] for one in own)
        L, R = (
            torch.cat([_padded(x, rank) for x in parts])
            for parts in ([one.L.mT for one in own], [one.R for one in own])
        )
        return LowRankQueries(L.mT, R)


@dataclass
class TokenQueries(LayerQueries):
    """P_q = sum_t d[q,t] x[q,t]^T as its T_q tokens, x (Q,T_q,I') with the bias feature written out, d (Q,T_q,O).

    Curvatures that are a Kronecker product solve tokens one by one and never form P.
    """

    x: Tensor
    d: Tensor
    _dense: Tensor | None = None

    @property
    def size(self) -> int:
        return self.x.shape[0]

    def scores(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, *, per_token: bool = False) -> Tensor:
        Q, T_q, I = self.x.shape
        O, T = self.d.shape[2], a.shape[1]
        if per_token:  # tokens are the factors of P
            return ops.gradient_dot_low_rank(self.d.mT, self.x, a, delta, mask=mask, bias=layer.bias, per_token=True)
        # FLOPs of the Gram products against those of g_n and its dots with P, for each example.
        if Q * T_q * T * (O + I) < O * I * (T + Q):
            a = written_out(layer, a)
            return ops.ghost_dot(self.x, self.d, a, delta, mask2=mask)
        if self._dense is None:
            self._dense = self.dense()
        return ops.gradient_dot(self._dense, a, delta, mask=mask, bias=layer.bias)

    def dense(self, at: slice = WHOLE) -> Tensor:
        return self.d[at].mT @ self.x[at]

    def joined(self, others: Sequence[LayerQueries]) -> LayerQueries:
        own = [self, *(one for one in others if isinstance(one, TokenQueries))]
        longest = max(one.x.shape[1] for one in own)
        x, d = ([_padded(getattr(one, key), longest) for one in own] for key in "xd")
        return TokenQueries(torch.cat(x), torch.cat(d))


@dataclass(frozen=True)
class Eigenbasis:
    """A layer's curvature (U_G (x) U_A) diag(Lambda) (U_G (x) U_A)^T, and 1 / (Lambda + damping) as `weight`."""

    U_A: Tensor
    U_G: Tensor
    weight: Tensor


@dataclass
class EigenbasisQueries(LayerQueries):
    """Queries of one position each, as tokens in the eigenbasis: x (Q,I') and d (Q,O).

    Training tokens are projected, 2 (O^2 + I'^2) FLOPs each, and met under the metric `weight`; P is never formed.
    Once so many training examples have come that rotating P back would have cost less, P is formed.
    """

    x: Tensor
    d: Tensor
    basis: Eigenbasis
    seen: int = field(default=0)
    _dense: Tensor | None = None

    @property
    def size(self) -> int:
        return self.x.shape[0]

    def scores(self, layer: Layer, a: Tensor, delta: Tensor, mask: Tensor | None, *, per_token: bool = False) -> Tensor:
        (Q, I), O = self.x.shape, self.d.shape[1]
        N, T, _ = a.shape
        self.seen += N
        if T == 1 and self._dense is None and self.seen * (O * O + I * I) <= Q * O * I * (O + I):
            x = ops.eigenbasis_project(a, self.basis.U_A, mask=mask, bias=layer.bias)
            d = ops.eigenbasis_project(delta, self.basis.U_G, mask=mask)
            scores = ops.weighted_ghost_dot(self.x, self.d, x, d, self.basis.weight)
            return scores.unsqueeze(2) if per_token else scores
        if self._dense is None:
            self._dense = self.dense()
        return ops.gradient_dot(self._dense, a, delta, mask=mask, bias=layer.bias, per_token=per_token)

    def dense(self, at: slice = WHOLE) -> Tensor:
        rotated = self.d[at].unsqueeze(2) * self.x[at].unsqueeze(1) * self.basis.weight
        return ops.eigenbasis_rotate(rotated, self.basis.U_A, self.basis.U_G, inverse=True)

    def joined(self, others: Sequence[LayerQueries]) -> LayerQueries:
        own = [self, *(one for one in others if isinstance(one, EigenbasisQueries))]
        return EigenbasisQueries(torch.cat([one.x for one in own]), torch.cat([one.d for one in own]), self.basis)


def low_rank(queries: Queries, model: InfluenceModel, rank: int | None) -> Queries:
    """Queries `truncated`, but for small layers of which there are many."""
    small = small_layers(model)
    return {name: own if name in small else truncated(own, model.layers[name], rank) for name, own in queries.items()}


def truncated(queries: LayerQueries, layer: Layer, rank: int | None) -> LayerQueries:
    """Each P_q of rank at most `rank`, nearly the best in the Frobenius norm; P as it is where that is no larger.

    Raises FloatingPointError when a query is not finite; names the layer.

    Source: Grosse et al. 2023 (arXiv:2308.03296), section 3.2.2; Halko et al. 2011 (arXiv:0909.4061), algorithm 5.1.
    """
    O, I = layer.shape
    if rank is None or rank * (O + I) >= O * I:
        return queries
    if isinstance(queries, TokenQueries) and queries.x.shape[1] <= rank:
        return LowRankQueries(queries.d.mT, queries.x)
    P = queries.dense()
    if not all_finite(P):
        raise FloatingPointError(f"layer {layer.name!r}: a preconditioned query is not finite")
    if len(P) == 0:
        return LowRankQueries(P.new_empty(0, O, rank), P.new_empty(0, rank, I))
    # The subspace is found from random vectors, always the same ones; the user's generator is as it was.
    generator = torch.cuda.default_generators[P.device.index] if P.is_cuda else torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(0)
        U, values, V = torch.svd_lowrank(P, min(rank + OVERSAMPLING, O, I), niter=2)
    finally:
        generator.set_state(state)
    return LowRankQueries((U * values.unsqueeze(1))[..., :rank].contiguous(), V[..., :rank].mT.contiguous())


def written_out(layer: Layer, a: Tensor) -> Tensor:
    """Layer inputs with the bias feature as a last column."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) if layer.bias else a


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens with masked positions zero."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))


def _padded(x: Tensor, positions: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, positions - x.shape[1]))
