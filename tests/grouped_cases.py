"""Calls of the ops on groups of layers: layers of several widths, and their formula layer by layer."""

from __future__ import annotations

from typing import Any

import formulas
import torch
from op_cases import F32, laid_out
from torch import Tensor

WIDTHS = ((3, 5), (70, 17), (16, 66), (1, 1))  # O, I
GROUPED = ("gradient_dot_grouped", "ekfac_solve_grouped")


def make_group(
    op: str,
    dtype: torch.dtype = F32,
    *,
    widths: tuple[tuple[int, int], ...] = WIDTHS,
    N: int = 4,
    T: int | None = 3,
    Q: int = 5,
    bias: bool = False,
    masked: bool = False,
    layout: str = "contiguous",
) -> dict[str, Any]:
    """Tokens and V are `dtype`, all else float32 or float64; masked positions hold NaN."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.float64 if dtype == torch.float64 else F32

    def draw(letters: str, *shape: int, kind: torch.dtype = factors) -> Tensor:
        return laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(kind), layout, letters)

    if op == "ekfac_solve_grouped":
        V = [draw("Q O I", Q, O, I, kind=dtype) for O, I in widths]
        U_A = [torch.linalg.qr(draw("I I", I, I)).Q for _, I in widths]
        U_G = [torch.linalg.qr(draw("O O", O, O)).Q for O, _ in widths]
        Lambda = [draw("O I", O, I).abs() for O, I in widths]
        return {"V": V, "U_A": U_A, "U_G": U_G, "Lambda": Lambda, "damping": [0.1 + l for l in range(len(widths))]}
    positions = (N,) if T is None else (N, T)
    mask = torch.rand(positions, generator=generator) > 0.3 if masked else None
    P = [draw("Q O I", Q, O, I + bias) for O, I in widths]
    a = [draw("N T I", *positions, I, kind=dtype) for _, I in widths]
    delta = [draw("N T O", *positions, O, kind=dtype) for O, _ in widths]
    if mask is not None:
        for x in a:
            x.masked_fill_(~mask[..., None], torch.nan)
    return {"P": P, "a": a, "delta": delta, "mask": mask, "bias": bias}


def group_formula(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    """In float64, layer by layer."""
    wide = {
        name: [x.double() if isinstance(x, Tensor) else x for x in value] if isinstance(value, list) else value
        for name, value in arguments.items()
    }
    if op == "ekfac_solve_grouped":
        layers = zip(wide["V"], wide["U_A"], wide["U_G"], wide["Lambda"], wide["damping"], strict=True)
        return [formulas.ekfac_solve(*layer) for layer in layers]
    scores = (
        formulas.gradient_dot(P, a, delta, mask=wide["mask"], bias=wide["bias"])
        for P, a, delta in zip(wide["P"], wide["a"], wide["delta"], strict=True)
    )
    return [sum(scores, torch.zeros(()))]
