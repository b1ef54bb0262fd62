"""Dot products of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import Layer, Problem, Rival, layer, normal, peer_einsum, peer_gradient, rows, tokens, tuned
from bench.products import Product


def dot(Q: int, N: int, T: int, O: int, I: int, per_token: bool = False) -> Problem:
    own, P = layer(N, T, O, I), normal(Q, O, I, seed=6)
    x, d, M, p = tokens(own.a), tokens(own.delta), N * T, O * I
    out = "qnt" if per_token else "qn"

    def query_first(mm: Product, P: Tensor, x: Tensor, d: Tensor) -> Tensor:
        terms = torch.stack([(mm(rows(d), one) * rows(x)).sum(1) for one in P]).view(len(P), N, T)
        return terms if per_token else terms.sum(2)

    def gradient_first(mm: Product, P: Tensor, x: Tensor, d: Tensor) -> Tensor:
        g = torch.stack([mm(d[n].T, x[n]) for n in range(N)])
        return mm(P.flatten(1), g.flatten(1).T)

    einsums = [
        Rival("einsum", lambda: torch.einsum(f"qnti,nti->{out}", torch.einsum("qoi,nto->qnti", P, d), x), "P delta"),
        Rival("einsum", lambda: torch.einsum(f"qnto,nto->{out}", torch.einsum("qoi,nti->qnto", P, x), d), "P a"),
    ]
    rivals = [*tuned(lambda mm: query_first(mm, P, x, d), detail="query first")]
    if not per_token:
        einsums.append(
            Rival("einsum", lambda: torch.einsum("qoi,noi->qn", P, torch.einsum("nto,nti->noi", d, x)), "delta a")
        )
        rivals += tuned(lambda mm: gradient_first(mm, P, x, d), detail="gradient first")
    fewest = f"qio,bti,bto->{out.replace('n', 'b')}"
    einsums.append(Rival("einsum", lambda: peer_einsum(fewest, P, d, x), "fewest operations, the peer's"))
    return Problem(
        "gradient_dot",
        {"P": P, "a": own.a, "delta": own.delta, "per_token": per_token},
        lambda: (query_first if per_token or T == 1 else gradient_first)(torch.mm, P.double(), x.double(), d.double()),
        (*einsums, *rivals),
        flops=2 * Q * M * p if per_token else min(2 * Q * M * p, 2 * M * p + 2 * Q * N * p),
    )


def low_rank(Q: int, r: int, N: int, T: int, O: int, I: int) -> Problem:
    own, L, R = layer(N, T, O, I), normal(Q, O, r, seed=6), normal(Q, r, I, seed=7)
    x, d = tokens(own.a), tokens(own.delta)

    def factored(mm: Product, L: Tensor, R: Tensor, x: Tensor, d: Tensor) -> Tensor:
        """Both sides for all queries at once, then their dot products."""
        left = mm(rows(d), L.transpose(0, 1).reshape(O, Q * r)).view(N, T, Q, r)
        right = mm(rows(x), R.reshape(Q * r, I).T).view(N, T, Q, r)
        return left.mul_(right).sum(dim=(1, 3)).T

    return Problem(
        "gradient_dot_low_rank",
        {"L": L, "R": R, "a": own.a, "delta": own.delta},
        lambda: factored(torch.mm, L.double(), R.double(), x.double(), d.double()),
        (
            Rival("peer", lambda: peer_einsum("qik,qko,bti,bto->qb", L, R, d, x)),
            *tuned(lambda mm: factored(mm, L, R, x, d)),
        ),
        flops=2 * Q * N * T * r * (O + I),
    )


def ghosts(M: int, N: int, T: int, O: int, I: int) -> Problem:
    first, second = layer(M, T, O, I), layer(N, T, O, I)
    a1, delta1, a2, delta2 = first.a.flip(0), first.delta.flip(0), second.a, second.delta

    def grams(mm: Product, a1: Tensor, delta1: Tensor, a2: Tensor, delta2: Tensor) -> Tensor:
        out = a1.new_empty(M, N)
        for m in range(M):
            out[m] = (mm(rows(delta2), delta1[m].T) * mm(rows(a2), a1[m].T)).view(N, -1).sum(1)
        return out

    def peer() -> Tensor:
        return torch.einsum("qio,tio->qt", peer_gradient(a1, delta1), peer_gradient(a2, delta2))

    return Problem(
        "ghost_dot",
        {"a1": a1, "delta1": delta1, "a2": a2, "delta2": delta2},
        lambda: grams(torch.mm, *(x.double() for x in (a1, delta1, a2, delta2))),
        (Rival("peer", peer), *tuned(lambda mm: grams(mm, a1, delta1, a2, delta2))),
        flops=min(2 * M * N * T * T * (O + I), 2 * (M + N) * T * O * I + 2 * M * N * O * I),
    )


def norms(N: int, T: int, O: int, I: int) -> Problem:
    own = layer(N, T, O, I)

    def grams(mm: Product, own: Layer) -> Tensor:
        return torch.stack([(mm(d, d.T) * mm(x, x.T)).sum() for x, d in zip(own.a, own.delta, strict=True)])

    return Problem(
        "ghost_norm",
        {"a": own.a, "delta": own.delta},
        lambda: grams(torch.mm, own.double()),
        (
            Rival("peer", lambda: peer_gradient(own.a, own.delta).square_().sum(dim=(1, 2))),
            *tuned(lambda mm: grams(mm, own)),
        ),
        flops=min(2 * N * T * T * (O + I), 2 * N * T * O * I),
    )


def gradients(N: int, T: int, O: int, I: int) -> Problem:
    own = layer(N, T, O, I)

    def each(mm: Product, own: Layer) -> Tensor:
        return torch.stack([mm(d.T, x) for x, d in zip(own.a, own.delta, strict=True)])

    return Problem(
        "per_sample_gradient",
        {"a": own.a, "delta": own.delta},
        lambda: each(torch.mm, own.double()),
        (Rival("peer", lambda: peer_gradient(own.a, own.delta)), *tuned(lambda mm: each(mm, own))),
        flops=2 * N * T * O * I,
    )


def weighted_ghosts(M: int, N: int, O: int, I: int) -> Problem:
    """Scores at T = 1 under 1 / (Lambda + damping). The peer forms the preconditioned queries."""
    own = layer(M + N, 1, O, I)
    weight = (own.Lambda + own.damping).reciprocal()
    a1, a2, delta1, delta2 = own.a[:M], own.a[M:], own.delta[:M], own.delta[M:]

    def row_dots(mm: Product, a1: Tensor, delta1: Tensor, a2: Tensor, delta2: Tensor, weight: Tensor) -> Tensor:
        parts = [mm(delta2 * d, weight).mul_(a2 * x).sum(1) for x, d in zip(a1, delta1, strict=True)]
        return torch.stack(parts)

    def peer() -> Tensor:
        return peer_einsum("qio,bi,bo->qb", peer_gradient(a1, delta1).mul_(weight), delta2, a2)

    return Problem(
        "weighted_ghost_dot",
        {"a1": a1, "delta1": delta1, "a2": a2, "delta2": delta2, "weight": weight},
        lambda: row_dots(torch.mm, *(x.double() for x in (a1, delta1, a2, delta2, weight))),
        (Rival("peer", peer), *tuned(lambda mm: row_dots(mm, a1, delta1, a2, delta2, weight))),
        flops=2 * M * N * O * I,
    )
