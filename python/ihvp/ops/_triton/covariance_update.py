"""C += sum over positions x x^T: the tiles on and above the diagonal, mirrored as they are added."""

from __future__ import annotations

from torch import Tensor

from ihvp.ops._rows import alike
from ihvp.ops._triton._launch import count
from ihvp.ops._triton._outer import add_sums
from ihvp.ops._triton._planes import flat, planes

CHUNK = 512  # positions summed by the tensor cores, which truncate, before a float32 sum takes them
MOST = 32 * 16 * CHUNK  # positions a call: at most 16 chunks a part, before C takes them


def run(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    N, T, _ = x.shape
    if C.shape[0] == 0 or N * T == 0:
        return
    narrow = alike(x)
    rows = flat(planes(x, mask, bias, narrow=narrow, common=True))
    for first in range(0, N * T, MOST):
        part = rows.rows(slice(first, first + MOST))
        positions = part.high.shape[1]
        chunk = min(CHUNK, positions)
        add_sums(C, part, part, count(positions, chunk), chunk, square=False, triangle=True)
