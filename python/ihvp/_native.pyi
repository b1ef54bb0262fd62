"""CPU kernels of ihvp. Arguments are tensors that speak DLPack; results are written into `out`."""

from collections.abc import Sequence

from torch import Tensor

def isas() -> dict[str, bool]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def covariance_update(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool, precision: str, threads: int) -> None: ...
def eigenbasis_project(out: Tensor, x: Tensor, U: Tensor, mask: Tensor | None, bias: bool, threads: int) -> None: ...
def eigenbasis_rotate(out: Tensor, V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool, threads: int) -> None: ...
def ekfac_diagonal_update(
    Lambda: Tensor,
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    mask: Tensor | None,
    bias: bool,
    order: str,
    precision: str,
    threads: int,
) -> None: ...
def ekfac_self_influence(
    out: Tensor,
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
    threads: int,
) -> None: ...
def ekfac_solve(
    out: Tensor, V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float], threads: int
) -> None: ...
def weighted_ghost_dot(
    out: Tensor,
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
    precision: str,
    threads: int,
) -> None: ...
def gradient_dot(
    out: Tensor,
    P: Tensor,
    a: Tensor,
    delta: Tensor,
    mask: Tensor | None,
    bias: bool,
    per_token: bool,
    order: str,
    precision: str,
    threads: int,
) -> None: ...
def gradient_dot_grouped(
    out: Tensor,
    P: list[Tensor],
    a: list[Tensor],
    delta: list[Tensor],
    mask: Tensor | None,
    bias: bool,
    threads: int,
) -> None: ...
def kfac_solve(out: Tensor, V: Tensor, L_A: Tensor, L_G: Tensor, threads: int) -> None: ...
def ghost_dot(
    out: Tensor,
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias1: bool,
    bias2: bool,
    per_token: bool,
    threads: int,
) -> None: ...
def ghost_norm(out: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, threads: int) -> None: ...
def per_sample_gradient(
    out: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, threads: int
) -> None: ...
def peak(dtype: str, rounds: int, threads: int) -> int: ...
