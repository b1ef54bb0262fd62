"""C += sum over positions x x^T."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    as_token_mask,
    as_tokens,
    check_accumulator,
    check_flag,
    check_mask,
    check_shape,
    check_tensors,
    features,
    read_tokens,
)
from ihvp.ops._gpu import cuda, triton
from ihvp.ops._precision import float32_products
from ihvp.ops._registry import Op
from ihvp.ops._rows import alike


def covariance_update_(C: Tensor, x: Tensor, *, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    """Add the second moment of tokens to a running sum, in place: C += sum_{n,t} mask[n,t] x[n,t] x[n,t]^T.

    With `bias`, x carries an implicit last feature 1. A masked position contributes nothing, whatever it holds.

    Args:
        C: (I',I') float32 or float64; float64 if x is. Symmetric sums stay symmetric.
        x: (N,T,I) or (N,I), float32, float64, bfloat16 or float16, any strides.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: append the implicit 1, I' = I + 1.

    Returns:
        C. Products are float32 (float64 for float64 x), summed in float32 over at most 2,048 positions and then added
        to C in its own type. The order of the sums is fixed: the same bits for any number of threads.
        Kernels for GPUs sum 512 positions on tensor cores, those sums in float32 for at most 262,144, then in C's type.
        Where torch's float32 matmul precision is not "highest", its default, processors with AVX512-VNNI read tokens as
        16-bit integers: a relative error (norms) of about 1e-4.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        the call's largest.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Martens and Grosse 2015 (arXiv:1503.05671), eq. 10, the factors A and G before division by their counts.
    """
    check_tensors(C=C, x=x)
    check_flag("bias", bias)
    tokens = as_tokens("x", x)
    check_mask("mask", mask, x)
    d = features(x, bias)
    check_shape("C", C, "(I',I')", (d, d))
    check_accumulator("C", C, x)
    _op(C, tokens, as_token_mask(mask), bias)
    return C


def reference(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    rows = read_tokens(x, mask, bias, C.dtype).flatten(0, 1)
    C += rows.T @ rows


def native(C: Tensor, x: Tensor, mask: Tensor | None, bias: bool) -> None:
    _native.covariance_update(C, x, mask, bias, float32_products(), torch.get_num_threads())


_op = Op(
    "covariance_update_",
    "(Tensor(a!) C, Tensor x, Tensor? mask, bool bias) -> ()",
    {
        "reference": reference,
        "native": native,
        "triton": triton("covariance_update"),
        "cuda": cuda("covariance_update", lambda C, x, *_: "" if alike(x) else "float32 operands"),
    },
    fake=lambda C, x, mask, bias: None,
)
