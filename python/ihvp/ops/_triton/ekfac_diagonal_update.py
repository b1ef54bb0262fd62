"""Lambda += sum_n (U_G^T g_n U_A)^2: a tile of Lambda is two accumulators, and no gradient leaves it."""

from __future__ import annotations

from torch import Tensor

from ihvp.ops._triton._outer import add_sums
from ihvp.ops._triton._planes import Planes, flat
from ihvp.ops._triton._projected import projected, token_planes

EXAMPLES = 4096  # squares summed in float32 before they are added to Lambda, which may be wider


def add_squares(Lambda: Tensor, a: Planes, delta: Planes, T: int) -> None:
    """Lambda += sum_n g_n^2; at T = 1 of planes of the squares: the square of a product is the product of squares."""
    N = a.high.shape[0]
    if T == 1:
        add_sums(Lambda, flat(delta), flat(a), 1, N, square=False, triangle=False)
    else:
        add_sums(Lambda, delta, a, N, T, square=True, triangle=False)


def run(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    N, T, _ = a.shape
    if N * T * Lambda.numel() == 0:
        return
    for n in range(0, N, EXAMPLES):
        part = slice(n, n + EXAMPLES)
        own = None if mask is None else mask[part]
        if U_A is None or U_G is None:
            add_squares(Lambda, *token_planes(a[part], delta[part], own, bias), T)
            continue
        for _, x, d in projected("ekfac_diagonal_update_", a[part], delta[part], U_A, U_G, own, bias):
            add_squares(Lambda, x, d, T)
