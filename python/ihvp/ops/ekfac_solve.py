"""Rotate, divide by (Lambda + damping), rotate back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import check_number, check_shape, check_tensors, compute_dtype, shape_of
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


def ekfac_solve(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: float | Sequence[float]) -> Tensor:
    """Solve with an eigenvalue-corrected Kronecker block.

    out[q] = U_G ((U_G^T V[q] U_A) / (Lambda + damping)) U_A^T, the solution P of
    (U_G (x) U_A) diag(Lambda + damping) (U_G (x) U_A)^T vec(P) = vec(V[q]). A sequence of D dampings shares the
    rotation and puts a dimension D in front.

    Args:
        V: (Q,O,I') or (O,I'), float32, float64, bfloat16 or float16, any strides.
        U_A, U_G: (I',I') and (O,O), eigenvectors in columns.
        Lambda: (O,I') eigenvalues, not negative.
        damping: a number >= 0, or a sequence of D of them.

    Returns:
        The shape of V, or (D, *V.shape); float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, or a negative damping. A zero in
        Lambda + damping divides as IEEE says; the IHVP objects refuse it by name.

    Source: George et al. 2018 (arXiv:1806.03884), eq. 8; Grosse et al. 2023 (arXiv:2308.03296), eq. 20.
    """
    check_tensors(V=V, U_A=U_A, U_G=U_G, Lambda=Lambda)
    if V.dim() not in (2, 3):
        raise ValueError(f"V must be (Q,O,I') or (O,I'), got {shape_of(V)}")
    O, I = V.shape[-2:]
    check_shape("U_A", U_A, "(I',I')", (I, I))
    check_shape("U_G", U_G, "(O,O)", (O, O))
    check_shape("Lambda", Lambda, "(O,I')", (O, I))
    several = isinstance(damping, (list, tuple))
    given: Any = damping if several else [damping]
    values = [check_number("damping", value) for value in given]
    if any(value < 0 for value in values):
        raise ValueError(f"damping must not be negative, got {damping}")
    out: Tensor = _op(V if V.dim() == 3 else V.unsqueeze(0), U_A, U_G, Lambda, values)
    return out.view(*([len(values)] if several else []), *V.shape)


def reference(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float]) -> Tensor:
    dtype = compute_dtype(V, U_A, U_G, Lambda)
    left, right = U_G.to(dtype), U_A.to(dtype)
    rotated = left.T @ V.to(dtype) @ right
    shifts = torch.tensor(damping, dtype=dtype, device=V.device).view(-1, 1, 1, 1)
    return left @ (rotated / (Lambda.to(dtype) + shifts)) @ right.T


def fake(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float]) -> Tensor:
    return V.new_empty(len(damping), *V.shape, dtype=compute_dtype(V, U_A, U_G, Lambda))


def native(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: Sequence[float]) -> Tensor:
    out = fake(V, U_A, U_G, Lambda, damping)
    _native.ekfac_solve(out, V, U_A, U_G, Lambda, damping, torch.get_num_threads())
    return out


_op = Op(
    "ekfac_solve",
    "(Tensor V, Tensor U_A, Tensor U_G, Tensor Lambda, float[] damping) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("ekfac_solve")},
    fake=fake,
)
