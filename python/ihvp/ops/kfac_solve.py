"""Batched Kronecker solve by Cholesky factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import check_shape, check_tensors, compute_dtype, shape_of
from ihvp.ops._registry import Op


def kfac_solve(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
    """Solve with a Kronecker product: out[q] = (L_G L_G^T)^-1 V[q] (L_A L_A^T)^-1.

    Args:
        V: (Q,O,I') or (O,I'), float32, float64, bfloat16 or float16, any strides.
        L_A, L_G: (I',I') and (O,O), lower triangular, as `kfac_factorize` gives them. What stands above the diagonal
            is not read.

    Returns:
        The shape of V; float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Martens and Grosse 2015 (arXiv:1503.05671), section 4.2: (G (x) A)^-1 vec(V) = vec(G^-1 V A^-1).
    """
    check_tensors(V=V, L_A=L_A, L_G=L_G)
    if V.dim() not in (2, 3):
        raise ValueError(f"V must be (Q,O,I') or (O,I'), got {shape_of(V)}")
    O, I = V.shape[-2:]
    check_shape("L_A", L_A, "(I',I')", (I, I))
    check_shape("L_G", L_G, "(O,O)", (O, O))
    out: Tensor = _op(V if V.dim() == 3 else V.unsqueeze(0), L_A, L_G)
    return out.squeeze(0) if V.dim() == 2 else out


def reference(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
    dtype = compute_dtype(V, L_A, L_G)
    left = torch.cholesky_solve(V.to(dtype), L_G.to(dtype).expand(V.shape[0], -1, -1))
    return torch.cholesky_solve(left.mT, L_A.to(dtype).expand(V.shape[0], -1, -1)).mT.contiguous()


def fake(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
    return V.new_empty(*V.shape, dtype=compute_dtype(V, L_A, L_G))


def native(V: Tensor, L_A: Tensor, L_G: Tensor) -> Tensor:
    out = fake(V, L_A, L_G)
    _native.kfac_solve(out, V, L_A, L_G, torch.get_num_threads())
    return out


_op = Op(
    "kfac_solve",
    "(Tensor V, Tensor L_A, Tensor L_G) -> Tensor",
    {"reference": reference, "native": native},
    fake=fake,
)
