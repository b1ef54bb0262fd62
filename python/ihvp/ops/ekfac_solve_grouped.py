"""`ekfac_solve` of many small layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp.ops._arguments import check_number, check_shape, compute_dtype, shape_of
from ihvp.ops._gpu import cuda, triton
from ihvp.ops._registry import Op
from ihvp.ops.ekfac_solve import ekfac_solve
from ihvp.ops.ekfac_solve import native as solve
from ihvp.ops.gradient_dot_grouped import check_group


def ekfac_solve_grouped(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    """Solve with an eigenvalue-corrected Kronecker block a layer: out_l = `ekfac_solve`(V_l, ..., damping_l).

    On a GPU one launch serves all layers of the group; it is meant for widths up to a few hundred.

    Args:
        V: for each layer (Q,O_l,I'_l); Q is the same in all layers, and so are the dtypes of each argument: float32,
            float64, bfloat16 or float16. Any strides.
        U_A, U_G: for each layer (I'_l,I'_l) and (O_l,O_l), eigenvectors in columns.
        Lambda: for each layer (O_l,I'_l) eigenvalues, not negative.
        damping: for each layer a number >= 0.

    Returns:
        For each layer the shape of V_l, float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: no layer, lists of different lengths, or an argument of another type, shape or device,
        named with its layer's number; a negative damping.

    Source: George et al. 2018 (arXiv:1806.03884), eq. 8.
    """
    check_group(V=V, U_A=U_A, U_G=U_G, Lambda=Lambda)
    if isinstance(damping, (int, float)) or len(damping) != len(V):
        raise ValueError(f"damping must be a list of {len(V)} numbers, one a layer, got {damping}")
    for layer, x in enumerate(V):
        if x.dim() != 3:
            raise ValueError(f"V[{layer}] must be (Q,O,I'), got {shape_of(x)}")
        Q, O, I = x.shape
        shapes = (U_A[layer].shape, U_G[layer].shape, Lambda[layer].shape)
        if Q == V[0].shape[0] and shapes == ((I, I), (O, O), (O, I)):
            continue
        check_shape(f"V[{layer}]", x, "(Q,O,I')", (V[0].shape[0], O, I))
        check_shape(f"U_A[{layer}]", U_A[layer], "(I',I')", (I, I))
        check_shape(f"U_G[{layer}]", U_G[layer], "(O,O)", (O, O))
        check_shape(f"Lambda[{layer}]", Lambda[layer], "(O,I')", (O, I))
    values = [check_number(f"damping[{layer}]", value) for layer, value in enumerate(damping)]
    if any(value < 0 for value in values):
        raise ValueError(f"damping must not be negative, got {damping}")
    result: list[Tensor] = _op(list(V), list(U_A), list(U_G), list(Lambda), values)
    return result


def reference(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    return [ekfac_solve(*layer) for layer in zip(V, U_A, U_G, Lambda, damping, strict=True)]


def fake(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    dtype = compute_dtype(*V, *U_A, *U_G, *Lambda)
    return [torch.empty(x.shape, dtype=dtype, device=x.device) for x in V]


def native(
    V: Sequence[Tensor],
    U_A: Sequence[Tensor],
    U_G: Sequence[Tensor],
    Lambda: Sequence[Tensor],
    damping: Sequence[float],
) -> list[Tensor]:
    layers = zip(V, U_A, U_G, Lambda, damping, strict=True)
    return [solve(v, A, G, values, [shift]).squeeze(0) for v, A, G, values, shift in layers]


_op = Op(
    "ekfac_solve_grouped",
    "(Tensor[] V, Tensor[] U_A, Tensor[] U_G, Tensor[] Lambda, float[] damping) -> Tensor[]",
    {
        "reference": reference,
        "native": native,
        "triton": triton("ekfac_solve_grouped"),
        "cuda": cuda("ekfac_solve_grouped"),
    },
    fake=fake,
)
