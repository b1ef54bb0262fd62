"""Matrices V into the Kronecker-factored eigenbasis, or back."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import check_flag, check_shape, check_tensors, compute_dtype, shape_of
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


def eigenbasis_rotate(V: Tensor, U_A: Tensor, U_G: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate: out[q] = U_G^T V[q] U_A, or with `inverse` back: out[q] = U_G V[q] U_A^T.

    Args:
        V: (Q,O,I') or (O,I'), float32, float64, bfloat16 or float16, any strides.
        U_A, U_G: (I',I') and (O,O), eigenvectors in columns.

    Returns:
        The shape of V; float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.1.
    """
    check_tensors(V=V, U_A=U_A, U_G=U_G)
    check_flag("inverse", inverse)
    if V.dim() not in (2, 3):
        raise ValueError(f"V must be (Q,O,I') or (O,I'), got {shape_of(V)}")
    O, I = V.shape[-2:]
    check_shape("U_A", U_A, "(I',I')", (I, I))
    check_shape("U_G", U_G, "(O,O)", (O, O))
    out: Tensor = _op(V if V.dim() == 3 else V.unsqueeze(0), U_A, U_G, inverse)
    return out.squeeze(0) if V.dim() == 2 else out


def reference(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool) -> Tensor:
    dtype = compute_dtype(V, U_A, U_G)
    left, right = U_G.to(dtype), U_A.to(dtype)
    return left @ V.to(dtype) @ right.T if inverse else left.T @ V.to(dtype) @ right


def fake(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool) -> Tensor:
    return V.new_empty(*V.shape, dtype=compute_dtype(V, U_A, U_G))


def native(V: Tensor, U_A: Tensor, U_G: Tensor, inverse: bool) -> Tensor:
    out = fake(V, U_A, U_G, inverse)
    _native.eigenbasis_rotate(out, V, U_A, U_G, inverse, torch.get_num_threads())
    return out


_op = Op(
    "eigenbasis_rotate",
    "(Tensor V, Tensor U_A, Tensor U_G, bool inverse) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("eigenbasis_rotate")},
    fake=fake,
)
