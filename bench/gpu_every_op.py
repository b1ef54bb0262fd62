"""Every op that has a kernel for GPUs, in float32 and bfloat16, at a small shape, a middle-sized and a large one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import BF16, F32, basis, randn

RANK, LAYERS = 16, 32


@dataclass(frozen=True)
class Sizes:
    N: int
    T: int
    width: int
    Q: int


SIZES = {"small": Sizes(8, 16, 64, 4), "large": Sizes(32, 64, 512, 8), "huge": Sizes(32, 512, 1024, 16)}


@dataclass(frozen=True)
class Plain:
    """An op and its arguments, measured against its reference alone."""

    op: str
    dtype: str
    size: str
    arguments: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype}, {self.size}"


def arguments(dtype: torch.dtype, sizes: Sizes) -> dict[str, Callable[[], dict[str, Any]]]:
    N, T, width, Q = sizes.N, sizes.T, sizes.width, sizes.Q

    def tokens(*names: str, positions: int = T) -> dict[str, Tensor]:
        return {name: randn(N, positions, width, dtype=dtype) for name in names or ("a", "delta")}

    def bases() -> dict[str, Tensor]:
        return {"U_A": basis(width, dtype), "U_G": basis(width, dtype)}

    def weights(*shape: int) -> Tensor:
        return randn(*shape, dtype=F32).abs().to(dtype) + 0.1

    def group(*shape: int) -> list[Tensor]:
        return [randn(*shape, dtype=dtype) for _ in range(LAYERS)]

    sets = ("a1", "delta1", "a2", "delta2")
    return {
        "covariance_update_": lambda: {"C": torch.zeros(width, width, device="cuda"), **tokens("x")},
        "eigenbasis_project": lambda: {**tokens("x"), "U": basis(width, dtype)},
        "eigenbasis_rotate": lambda: {"V": randn(Q, width, width, dtype=dtype), **bases()},
        "ekfac_diagonal_update_": lambda: {
            "Lambda": torch.zeros(width, width, device="cuda"),
            **tokens(),
            **bases(),
        },
        "ekfac_self_influence": lambda: {**tokens(), **bases(), "Lambda": weights(width, width), "damping": 0.1},
        "ekfac_solve": lambda: {
            "V": randn(Q, width, width, dtype=dtype),
            **bases(),
            "Lambda": weights(width, width),
            "damping": 0.1,
        },
        "ekfac_solve_grouped": lambda: {
            "V": group(Q, 8, 64),
            "U_A": [basis(64, dtype) for _ in range(LAYERS)],
            "U_G": [basis(8, dtype) for _ in range(LAYERS)],
            "Lambda": [weights(8, 64) for _ in range(LAYERS)],
            "damping": [0.1] * LAYERS,
        },
        "ghost_dot": lambda: tokens(*sets),
        "ghost_norm": lambda: tokens(),
        "gradient_dot": lambda: {"P": randn(Q, width, width, dtype=dtype), **tokens()},
        "gradient_dot_grouped": lambda: {"P": group(Q, 8, 64), "a": group(N, T, 64), "delta": group(N, T, 8)},
        "gradient_dot_low_rank": lambda: {
            "L": randn(Q, width, RANK, dtype=dtype),
            "R": randn(Q, RANK, width, dtype=dtype),
            **tokens(),
        },
        "per_sample_gradient": lambda: tokens(),
        "weighted_ghost_dot": lambda: {**tokens(*sets, positions=1), "weight": weights(width, width)},
    }


EVERY_OP = tuple(
    Plain(op, str(dtype).removeprefix("torch."), size, make)
    for size, sizes in SIZES.items()
    for dtype in (F32, BF16)
    for op, make in arguments(dtype, sizes).items()
)
