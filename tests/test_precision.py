"""weighted_ghost_dot at torch's float32 matmul precisions."""

from __future__ import annotations

import pytest
import torch
from ihvp import _native, ops
from torch import Tensor


def tokens_and_weight(noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """64 and 70 examples of one position, a weight 1 / (Lambda + damping), and the float64 result."""
    torch.manual_seed(0)
    eigenvalues = torch.outer(*(torch.logspace(0, -4, d) for d in (97, 131)))
    weight = 1 / (eigenvalues * (1 + noise * torch.randn(97, 131)).abs() + 0.01)
    given = {name: torch.randn(64 if "1" in name else 70, 131 if name[0] == "a" else 97) for name in TOKENS}
    g1, g2 = (given[f"delta{i}"].double().unsqueeze(2) * given[f"a{i}"].double().unsqueeze(1) for i in (1, 2))
    return {**given, "weight": weight}, torch.einsum("moi,noi,oi->mn", g1, g2, weight.double())


TOKENS = ("a1", "delta1", "a2", "delta2")


@pytest.mark.parametrize("noise", (0.0, 0.05, 5.0), ids="noise={}".format)
@pytest.mark.parametrize(("precision", "limit"), (("highest", 1e-6), ("high", 5e-4), ("medium", 1e-2)))
def test_weighted_ghost_dot_at_torchs_precisions(isa: str, precision: str, limit: float, noise: float) -> None:
    """With AMX the residual of a smooth weight goes through bfloat16 products, and a rough weight through float32."""
    given, want = tokens_and_weight(noise)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = ops.weighted_ghost_dot(**given)
        given["weight"] *= 2  # a weight that changed in place is split anew
        twice = ops.weighted_ghost_dot(**given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((got.double() - want).norm() / want.norm()) < limit
    assert float((twice.double() - 2 * want).norm() / want.norm()) < 2 * limit


@pytest.mark.parametrize(("precision", "limit"), (("float32", 1e-6), ("bf16x3", 1e-5), ("bf16", 1e-2)))
def test_products_of_bfloat16_pieces(isa: str, precision: str, limit: float) -> None:
    given, want = tokens_and_weight(5.0)
    tokens = {name: x.unsqueeze(1) if name in TOKENS else x for name, x in given.items()}
    out = torch.empty(64, 70)
    _native.weighted_ghost_dot(out, **tokens, mask1=None, mask2=None, bias=False, precision=precision, threads=1)
    assert float((out.double() - want).norm() / want.norm()) < limit


def test_equal_terms_whose_errors_add_up(isa: str) -> None:
    """Equal factors round alike, so that their errors add up instead of averaging out."""
    ones, a2 = torch.ones(4, 512), torch.full((4, 512), 1.0039291381835938)
    weight = torch.full((512, 512), 1.0194169282913208)
    want = 512 * 512 * float(a2[0, 0].double() * weight[0, 0].double())
    assert ops.weighted_ghost_dot(ones, ones, a2, ones, weight).sub(want).abs().max() / want < 1e-5
