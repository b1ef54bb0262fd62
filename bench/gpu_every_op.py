"""Every op that has a kernel for GPUs, in float32 and bfloat16, at one middle-sized shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu_cases import BF16, F32, basis, randn

N, T, WIDTH, QUERIES, RANK, LAYERS = 32, 64, 512, 8, 16, 32


@dataclass(frozen=True)
class Plain:
    """An op and its arguments, measured against its reference alone."""

    op: str
    dtype: str
    arguments: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype}"


def tokens(dtype: torch.dtype, names: tuple[str, ...] = ("a", "delta"), positions: int = T) -> dict[str, Tensor]:
    return {name: randn(N, positions, WIDTH, dtype=dtype) for name in names}


def bases(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"U_A": basis(WIDTH, dtype), "U_G": basis(WIDTH, dtype)}


def weights(dtype: torch.dtype) -> Tensor:
    return randn(WIDTH, WIDTH, dtype=F32).abs().to(dtype) + 0.1


def arguments(dtype: torch.dtype) -> dict[str, Callable[[], dict[str, Any]]]:
    square, sets = (WIDTH, WIDTH), ("a1", "delta1", "a2", "delta2")
    V = (QUERIES, *square)
    return {
        "covariance_update_": lambda: {"C": torch.zeros(square, device="cuda"), **tokens(dtype, ("x",))},
        "eigenbasis_project": lambda: {**tokens(dtype, ("x",)), "U": basis(WIDTH, dtype)},
        "eigenbasis_rotate": lambda: {"V": randn(*V, dtype=dtype), **bases(dtype)},
        "ekfac_diagonal_update_": lambda: {
            "Lambda": torch.zeros(square, device="cuda"),
            **tokens(dtype),
            **bases(dtype),
        },
        "ekfac_self_influence": lambda: {**tokens(dtype), **bases(dtype), "Lambda": weights(dtype), "damping": 0.1},
        "ekfac_solve": lambda: {
            "V": randn(*V, dtype=dtype),
            **bases(dtype),
            "Lambda": weights(dtype),
            "damping": 0.1,
        },
        "ghost_dot": lambda: tokens(dtype, sets),
        "ghost_norm": lambda: tokens(dtype),
        "gradient_dot": lambda: {"P": randn(*V, dtype=dtype), **tokens(dtype)},
        "gradient_dot_low_rank": lambda: {
            "L": randn(QUERIES, WIDTH, RANK, dtype=dtype),
            "R": randn(QUERIES, RANK, WIDTH, dtype=dtype),
            **tokens(dtype),
        },
        "gradient_dot_grouped": lambda: {
            "P": [randn(QUERIES, 8, 64, dtype=dtype) for _ in range(LAYERS)],
            "a": [randn(N, T, 64, dtype=dtype) for _ in range(LAYERS)],
            "delta": [randn(N, T, 8, dtype=dtype) for _ in range(LAYERS)],
        },
        "ekfac_solve_grouped": lambda: {
            "V": [randn(QUERIES, 8, 64, dtype=dtype) for _ in range(LAYERS)],
            "U_A": [basis(64, dtype) for _ in range(LAYERS)],
            "U_G": [basis(8, dtype) for _ in range(LAYERS)],
            "Lambda": [randn(8, 64, dtype=F32).abs().to(dtype) + 0.1 for _ in range(LAYERS)],
            "damping": [0.1] * LAYERS,
        },
        "per_sample_gradient": lambda: tokens(dtype),
        "weighted_ghost_dot": lambda: {**tokens(dtype, sets, 1), "weight": weights(dtype)},
    }


EVERY_OP = tuple(
    Plain(op, str(dtype).removeprefix("torch."), make) for dtype in (F32, BF16) for op, make in arguments(dtype).items()
)
