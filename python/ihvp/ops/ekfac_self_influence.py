"""g_n^T (F + damping I)^-1 g_n in the eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    check_flag,
    check_number,
    check_pair,
    check_shape,
    check_tensors,
    compute_dtype,
    features,
    read_tokens,
)
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


def ekfac_self_influence(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    *,
    mask: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Self-influence of every example, without rotating back.

    out[n] = sum_{o,i} (U_G^T g_n U_A)[o,i]^2 / (Lambda[o,i] + damping) = g_n^T (F + damping I)^-1 g_n.

    Args:
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. float32, float64,
            bfloat16 or float16, any strides.
        U_A, U_G: (I',I') and (O,O) eigenvectors in columns; None for both: the standard basis.
        Lambda: (O,I') eigenvalues, not negative.
        damping: a number >= 0.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1, I' = I + 1.

    Returns:
        (N,), float64 if an operand is, float32 otherwise. The same bits for any number of threads.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        their example's largest.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, or a negative damping.

    Source: Koh and Liang 2017 (arXiv:1703.04730), section 5.4, with the curvature of George et al. 2018.
    """
    check_tensors({"U_A": U_A, "U_G": U_G}, a=a, delta=delta, Lambda=Lambda)
    check_flag("bias", bias)
    tokens_a, tokens_delta, mask = check_pair(a, delta, mask)
    I, O = features(a, bias), delta.shape[-1]
    check_shape("Lambda", Lambda, "(O,I')", (O, I))
    check_shape("U_A", U_A, "(I',I')", (I, I))
    check_shape("U_G", U_G, "(O,O)", (O, O))
    if (U_A is None) != (U_G is None):
        raise ValueError("U_A and U_G must both be given or both be None")
    value = check_number("damping", damping)
    if value < 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    result: Tensor = _op(tokens_a, tokens_delta, U_A, U_G, Lambda, value, mask, bias)
    return result


def reference(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
) -> Tensor:
    dtype = compute_dtype(a, delta, U_A, U_G, Lambda)
    x, d = read_tokens(a, mask, bias, dtype), read_tokens(delta, mask, False, dtype)
    if U_A is not None and U_G is not None:
        x, d = x @ U_A.to(dtype), d @ U_G.to(dtype)
    weight = 1 / (Lambda.to(dtype) + damping)
    out = x.new_empty(x.shape[0])
    for n in range(x.shape[0]):
        out[n] = ((d[n].T @ x[n]).square() * weight).sum()
    return out


def fake(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
) -> Tensor:
    return a.new_empty(a.shape[0], dtype=compute_dtype(a, delta, U_A, U_G, Lambda))


def native(
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    Lambda: Tensor,
    damping: float,
    mask: Tensor | None,
    bias: bool,
) -> Tensor:
    out = fake(a, delta, U_A, U_G, Lambda, damping, mask, bias)
    if a.shape[1] * Lambda.numel() == 0:
        return out.zero_()
    _native.ekfac_self_influence(out, a, delta, U_A, U_G, Lambda, damping, mask, bias, torch.get_num_threads())
    return out


_op = Op(
    "ekfac_self_influence",
    "(Tensor a, Tensor delta, Tensor? U_A, Tensor? U_G, Tensor Lambda, float damping, Tensor? mask, bool bias)"
    " -> Tensor",
    {"reference": reference, "native": native, "triton": triton("ekfac_self_influence")},
    fake=fake,
)
