"""Rows of x into the eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    as_token_mask,
    as_tokens,
    check_flag,
    check_mask,
    check_shape,
    check_tensors,
    compute_dtype,
    features,
    read_tokens,
)
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


def eigenbasis_project(x: Tensor, U: Tensor, *, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    """Tokens in an eigenbasis: out[n,t] = U^T [x[n,t]; 1], the bias row of U folded in; zero where masked.

    Args:
        x: (N,T,I) or (N,I), float32, float64, bfloat16 or float16, any strides.
        U: (I',I') eigenvectors in columns.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: x carries an implicit last feature 1, I' = I + 1.

    Returns:
        (N,T,I') or (N,I'), float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: George et al. 2018 (arXiv:1806.03884), section 3.1, the Kronecker-factored eigenbasis.
    """
    check_tensors(x=x, U=U)
    check_flag("bias", bias)
    tokens = as_tokens("x", x)
    check_mask("mask", mask, x)
    d = features(x, bias)
    check_shape("U", U, "(I',I')", (d, d))
    out: Tensor = _op(tokens, U, as_token_mask(mask), bias)
    return out.squeeze(1) if x.dim() == 2 else out


def reference(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    dtype = compute_dtype(x, U)
    return read_tokens(x, mask, bias, dtype) @ U.to(dtype)


def fake(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], U.shape[1], dtype=compute_dtype(x, U))


def native(x: Tensor, U: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = fake(x, U, mask, bias)
    _native.eigenbasis_project(out, x, U, mask, bias, torch.get_num_threads())
    return out


_op = Op(
    "eigenbasis_project",
    "(Tensor x, Tensor U, Tensor? mask, bool bias) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("eigenbasis_project")},
    fake=fake,
)
