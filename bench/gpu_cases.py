"""What `bench gpu` measures: ops at shapes, the same by tuned torch, and what the counts of both predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An H200 in FLOP/s and bytes/s: matrix rates of the datasheet, but bfloat16 and the copy as measured through torch.
PEAKS = {"bf16": 790e12, "fp16x3": 790e12 / 3, "tf32": 495e12, "tf32x3": 165e12, "fp32": 67e12}
BANDWIDTH = 4.3e12
LAUNCH = 4e-6  # seconds from one small kernel to the next
LISTING = 6e-6  # seconds in which the host looks at one layer of a group and lists its addresses, as measured

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Stage:
    """One kernel: its operations at a rate of PEAKS, the bytes that it must read and write, and how often it runs."""

    flops: float
    bytes: float
    rate: str
    times: int = 1

    @property
    def seconds(self) -> float:
        return self.times * (max(self.flops / PEAKS[self.rate], self.bytes / BANDWIDTH) + LAUNCH)


@dataclass(frozen=True)
class Case:
    """An op at a shape, the same computed by tuned torch, the stages of both, and what the ratio is meant to reach."""

    name: str
    op: str
    dtype: str  # of the operands
    precision: str
    arguments: Callable[[], dict[str, Any]]
    rival: Callable[..., Any]
    ours: Sequence[Stage]
    theirs: Sequence[Stage]
    goal: float
    limit: float  # of the relative error
    host: float = 0.0  # seconds before our first kernel starts

    @property
    def expected(self) -> tuple[float, float]:
        return self.host + sum(stage.seconds for stage in self.ours), sum(stage.seconds for stage in self.theirs)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=F32).to(dtype)


def basis(d: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(randn(d, d, dtype=F32)).Q.to(dtype)


# --- the corrected diagonal ------------------------------------------------------------------------------------


def diagonal(N: int, T: int, d: int) -> Case:
    M, p = N * T, d * d
    project = [Stage(2 * M * p, 4 * M * d, "bf16")] * 2

    def rival(Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor, U_G: Tensor) -> Tensor:
        g = torch.bmm((delta @ U_G).mT, a @ U_A)
        return Lambda.add_(g.square_().sum(0, dtype=F32))

    return Case(
        f"ekfac_diagonal_update_ N={N} T={T} {d}x{d} bf16",
        "ekfac_diagonal_update_",
        "bfloat16",
        "medium",
        lambda: {
            "Lambda": torch.zeros(d, d, device="cuda"),
            "a": randn(N, T, d),
            "delta": randn(N, T, d),
            "U_A": basis(d, BF16),
            "U_G": basis(d, BF16),
        },
        rival,
        [*project, Stage(2 * M * p, 4 * M * d + 8 * p, "bf16")],
        [
            *project,
            Stage(2 * M * p, 4 * M * d + 2 * N * p, "bf16"),
            Stage(N * p, 4 * N * p, "fp32"),
            Stage(N * p, 2 * N * p, "fp32"),
        ],
        2.5,
        1e-2,
    )


# --- covariance, solves, scores --------------------------------------------------------------------------------


def covariance(M: int, d: int) -> Case:
    tiles = math.ceil(d / 128)
    half = (tiles + 1) / (2 * tiles)

    def rival(C: Tensor, x: Tensor) -> Tensor:
        return C.add_(torch.addmm(torch.zeros(d, d, dtype=BF16, device="cuda"), x[0].T, x[0]))

    return Case(
        f"covariance_update_ {M}x{d} bf16",
        "covariance_update_",
        "bfloat16",
        "medium",
        lambda: {"C": torch.zeros(d, d, device="cuda"), "x": randn(1, M, d)},
        rival,
        [Stage(2 * M * d * d * half, 2 * M * d, "bf16"), Stage(d * d, 32 * d * d, "fp32")],
        [Stage(2 * M * d * d, 2 * M * d, "bf16"), Stage(d * d, 10 * d * d, "fp32")],
        1.6,
        1e-2,
    )


def solve(Q: int, d: int) -> Case:
    product = Stage(2 * Q * d**3, 8 * Q * d * d, "fp16x3")
    planes = Stage(Q * d * d, 12 * Q * d * d, "fp32")  # read to find the largest, read again and written
    plain = Stage(2 * Q * d**3, 8 * Q * d * d, "fp32")

    def rival(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: float) -> Tensor:
        return U_G @ ((U_G.T @ V @ U_A) / (Lambda + damping)) @ U_A.T

    return Case(
        f"ekfac_solve Q={Q} {d}x{d} float32",
        "ekfac_solve",
        "float32",
        "highest",
        lambda: {
            "V": randn(Q, d, d, dtype=F32),
            "U_A": basis(d, F32),
            "U_G": basis(d, F32),
            "Lambda": randn(d, d, dtype=F32).abs(),
            "damping": 0.1,
        },
        rival,
        [planes, product, product, planes, product, product],
        [*[plain] * 4, Stage(Q * d * d, 8 * Q * d * d, "fp32")],
        1.5,
        1e-5,
    )


def scores(Q: int, N: int, T: int, d: int) -> Case:
    M, p = N * T, d * d
    gradients = Stage(2 * M * p, 4 * M * d + 2 * N * p, "bf16")
    dots = Stage(2 * Q * N * p, 2 * (Q + N) * p, "bf16")
    rows = [Stage(2 * Q * M * p, 2 * Q * p + 4 * M * d, "bf16")]
    query_first = [Stage(2 * M * p, 4 * M * d, "bf16", Q), Stage(2 * M * d, 6 * M * d, "fp32", 2 * Q)]

    def gradient_first(P: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return P.flatten(1) @ torch.bmm(delta.mT, a).flatten(1).T

    def by_query(P: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return torch.stack([((delta @ own) * a).sum((1, 2), dtype=F32) for own in P])

    ours = min([gradients, dots], rows, key=lambda stages: sum(stage.seconds for stage in stages))
    theirs = min([gradients, dots], query_first, key=lambda stages: sum(stage.seconds for stage in stages))
    return Case(
        f"gradient_dot Q={Q} N={N} T={T} {d}x{d} bf16",
        "gradient_dot",
        "bfloat16",
        "medium",
        lambda: {"P": randn(Q, d, d), "a": randn(N, T, d), "delta": randn(N, T, d)},
        by_query if theirs is query_first else gradient_first,
        ours,
        theirs,
        1.5,
        1e-2,
    )


# --- many small layers -----------------------------------------------------------------------------------------


# Both layers of each of 250 adapters of rank 8, (O,I) of each.
LORA = [shape for i in range(250) for shape in ((8, (64, 96, 128)[i % 3]), ((64, 96, 128)[i % 3], 8))]


def grouped_scores(shapes: Sequence[tuple[int, int]], Q: int, N: int, T: int) -> Case:
    layers, p = len(shapes), sum(O * I for O, I in shapes)

    def rival(P: list[Tensor], a: list[Tensor], delta: list[Tensor]) -> Tensor:
        out = torch.zeros(Q, N, device="cuda")
        for own, x, d in zip(P, a, delta, strict=True):
            out += own.flatten(1) @ torch.bmm(d.mT, x).float().flatten(1).T
        return out

    moved = 2 * N * T * sum(O + I for O, I in shapes) + 4 * Q * p
    return Case(
        f"gradient_dot_grouped {layers} adapter layers Q={Q} N={N} T={T} bf16",
        "gradient_dot_grouped",
        "float32",
        "medium",
        lambda: {
            "P": [randn(Q, O, I, dtype=F32) for O, I in shapes],
            "a": [randn(N, T, I) for _, I in shapes],
            "delta": [randn(N, T, O) for O, _ in shapes],
        },
        rival,
        [
            Stage(2 * N * T * p * Q, moved, "tf32"),  # query-first
            Stage(layers * Q * N, 4 * layers * Q * N, "fp32"),
        ],
        [
            Stage(2 * N * T * p / layers, moved / layers, "bf16", layers),
            Stage(2 * Q * N * p / layers, (6 * N * p + 4 * Q * p) / layers, "fp32", 3 * layers),
        ],
        5.0,
        1e-2,
        layers * LISTING,
    )


def grouped_solves(shapes: Sequence[tuple[int, int]], Q: int) -> Case:
    layers, p = len(shapes), sum(O * I for O, I in shapes)

    def rival(
        V: list[Tensor], U_A: list[Tensor], U_G: list[Tensor], Lambda: list[Tensor], damping: list[float]
    ) -> list[Tensor]:
        return [
            G @ ((G.T @ x @ A) / (own + shift)) @ A.T
            for x, A, G, own, shift in zip(V, U_A, U_G, Lambda, damping, strict=True)
        ]

    flops = sum(4 * Q * O * I * (O + I) for O, I in shapes)
    bases = sum(O * O + I * I for O, I in shapes)
    return Case(
        f"ekfac_solve_grouped {layers} adapter layers Q={Q} float32",
        "ekfac_solve_grouped",
        "float32",
        "highest",
        lambda: {
            "V": [randn(Q, O, I, dtype=F32) for O, I in shapes],
            "U_A": [basis(I, F32) for _, I in shapes],
            "U_G": [basis(O, F32) for O, _ in shapes],
            "Lambda": [randn(O, I, dtype=F32).abs() for O, I in shapes],
            "damping": [0.1] * layers,
        },
        rival,
        [Stage(flops, 4 * (2 * Q * p + p + bases), "tf32x3")],
        [
            Stage(flops / layers / 4, 8 * Q * p / layers, "fp32", 4 * layers),
            Stage(Q * p / layers, 12 * Q * p / layers, "fp32", 2 * layers),
        ],
        5.0,
        1e-5,
        layers * LISTING,
    )


CASES = (
    diagonal(64, 128, 1024),
    diagonal(64, 512, 1024),
    covariance(65536, 1024),
    solve(64, 1024),
    scores(16, 64, 128, 1024),
    scores(1, 64, 128, 1024),
    grouped_scores(LORA, 16, 64, 32),
    grouped_solves(LORA, 16),
)


def expected() -> str:
    """The table of what the counts predict on an H200, written down before anything is measured."""
    lines = [f"{'case':<66}{'GFLOP':>9}{'MB':>9}{'ms':>9}{'torch ms':>10}{'ratio':>7}{'goal':>6}"]
    for case in CASES:
        ours, theirs = case.expected
        flops = sum(stage.flops * stage.times for stage in case.ours) / 1e9
        moved = sum(stage.bytes * stage.times for stage in case.ours) / 1e6
        lines.append(
            f"{case.name:<66}{flops:9.1f}{moved:9.1f}{ours * 1e3:9.3f}{theirs * 1e3:10.3f}"
            f"{theirs / ours:7.1f}{case.goal:6.1f}"
        )
    return "\n".join(lines)
