"""What EKFAC does in the eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.problem import F64, Layer, Problem, Rival, layer, normal, peer_gradient, rows, tuned
from bench.products import Product


def project(N: int, T: int, d: int) -> Problem:
    """With a bias feature and a mask."""
    x, U = normal(N, T, d), torch.linalg.qr(normal(d + 1, d + 1, seed=3)).Q
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(4)) > 0.2

    def masked(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(N, T, 1)], dim=2).masked_fill_(~mask.unsqueeze(-1), 0)

    return Problem(
        "eigenbasis_project",
        {"x": x, "U": U, "mask": mask, "bias": True},
        lambda: masked(x.double()) @ U.double(),
        (
            Rival("peer", lambda: torch.matmul(masked(x), U)),
            *tuned(lambda mm: mm(rows(masked(x)), U).view(N, T, d + 1)),
        ),
        flops=2 * N * T * (d + 1) ** 2,
    )


def rotation(mm: Product, V: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left V[q] right: one product for all q, then one for each."""
    turned = mm(rows(V), right).view(V.shape)
    return torch.stack([mm(left, x) for x in turned])


def rotate(Q: int, O: int, I: int) -> Problem:
    own, V = layer(1, 1, O, I), normal(Q, O, I)
    wide = own.double()
    return Problem(
        "eigenbasis_rotate",
        {"V": V, "U_A": own.U_A, "U_G": own.U_G},
        lambda: wide.U_G.T @ (V.double() @ wide.U_A),
        (
            Rival("peer", lambda: torch.matmul(own.U_G.t(), torch.matmul(V, own.U_A))),
            *tuned(lambda mm: rotation(mm, V, own.U_G.T, own.U_A)),
        ),
        flops=2 * Q * O * I * (O + I),
    )


def diagonal(N: int, T: int, O: int, I: int) -> Problem:
    own, Lambda = layer(N, T, O, I), torch.zeros(O, I)

    def peer() -> Tensor:
        g = peer_gradient(own.a, own.delta)
        return Lambda.add_(torch.matmul(own.U_G.t(), torch.matmul(g, own.U_A)).square_().sum(dim=0))

    def project_first(mm: Product, own: Layer, Lambda: Tensor) -> Tensor:
        x, d = mm(rows(own.a), own.U_A), mm(rows(own.delta), own.U_G)
        if T == 1:
            return Lambda.add_(mm(d.square_().T, x.square_()))
        for n in range(N):
            here = slice(n * T, (n + 1) * T)
            g = mm(d[here].T, x[here])
            Lambda.addcmul_(g, g)
        return Lambda

    M, p = N * T, O * I
    project_flops = 2 * M * (O * O + I * I + p)
    return Problem(
        "ekfac_diagonal_update_",
        {"Lambda": Lambda, "a": own.a, "delta": own.delta, "U_A": own.U_A, "U_G": own.U_G},
        lambda: project_first(torch.mm, own.double(), torch.zeros(O, I, dtype=F64)),
        (Rival("peer", peer), *tuned(lambda mm: project_first(mm, own, Lambda))),
        flops=min(project_flops, 2 * M * p + 2 * N * p * (O + I)),
        target=Lambda,
    )


def solve(Q: int, O: int, I: int) -> Problem:
    own, V = layer(1, 1, O, I), normal(Q, O, I)

    def peer(own: Layer, V: Tensor, damping: float) -> Tensor:
        weight = (own.Lambda + damping).reciprocal_()
        V = torch.matmul(own.U_G.t(), torch.matmul(V, own.U_A)).mul_(weight)
        return torch.matmul(own.U_G, torch.matmul(V, own.U_A.t()))

    def flat(mm: Product) -> Tensor:
        weight = (own.Lambda + own.damping).reciprocal_()
        return rotation(mm, rotation(mm, V, own.U_G.T, own.U_A).mul_(weight), own.U_G, own.U_A.T)

    return Problem(
        "ekfac_solve",
        {"V": V, "U_A": own.U_A, "U_G": own.U_G, "Lambda": own.Lambda, "damping": own.damping},
        lambda: peer(own.double(), V.double(), own.damping),
        (Rival("peer", lambda: peer(own, V, own.damping)), *tuned(flat)),
        flops=4 * Q * O * I * (O + I),
    )


def self_influence(N: int, T: int, O: int, I: int) -> Problem:
    own = layer(N, T, O, I)
    damping = own.damping

    def peer() -> Tensor:
        weight = (own.Lambda + damping).reciprocal_()
        g = peer_gradient(own.a, own.delta)
        solved = torch.matmul(own.U_G.t(), torch.matmul(g, own.U_A)).mul_(weight)
        solved = torch.matmul(own.U_G, torch.matmul(solved, own.U_A.t()))
        return solved.mul_(g).sum(dim=(1, 2))

    def project_first(mm: Product, own: Layer) -> Tensor:
        weight = (own.Lambda + damping).reciprocal_()
        x, d = mm(rows(own.a), own.U_A), mm(rows(own.delta), own.U_G)
        if T == 1:
            return mm(d.square_(), weight).mul_(x.square_()).sum(1)
        parts = [slice(n * T, (n + 1) * T) for n in range(N)]
        return torch.stack([(mm(d[part].T, x[part]).square_() * weight).sum() for part in parts])

    return Problem(
        "ekfac_self_influence",
        {
            "a": own.a,
            "delta": own.delta,
            "U_A": own.U_A,
            "U_G": own.U_G,
            "Lambda": own.Lambda,
            "damping": damping,
        },
        lambda: project_first(torch.mm, own.double()),
        (Rival("peer", peer), *tuned(lambda mm: project_first(mm, own))),
        flops=2 * N * T * (O * O + I * I + O * I),
    )
