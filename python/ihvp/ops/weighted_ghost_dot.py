"""sum_oi weight g_m g_n at T = 1, from rank-one gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    check_flag,
    check_pair,
    check_shape,
    check_tensors,
    compute_dtype,
    features,
    read_tokens,
)
from ihvp.ops._registry import Op


def weighted_ghost_dot(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    *,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Dot products of rank-one gradients under a diagonal metric, without forming a gradient or a query.

    S[m,n] = sum_{o,i} weight[o,i] g_m[o,i] g_n[o,i] with g = delta a^T. For tokens in the eigenbasis and
    weight = 1 / (Lambda + damping) this is g_m^T (F + damping I)^-1 g_n; a dense P of Q O I' numbers is never made.

    Args:
        a1: (M,I) or (M,1,I), delta1: (M,O) or (M,1,O); a2: (N,I) or (N,1,I), delta2: (N,O) or (N,1,O). float32,
            float64, bfloat16 or float16, any strides. One position an example: beyond that `gradient_dot` costs less.
        weight: (O,I').
        mask1, mask2: (M,1), (N,1) bool, True at real positions; None: all are.
        bias: a1 and a2 carry an implicit last feature 1, I' = I + 1.

    Returns:
        (M,N), float64 if an operand is, float32 otherwise. The same bits for any number of threads. Where
        `torch.get_float32_matmul_precision()` is not "highest", torch's default, a processor with AMX makes a float32
        product of three bfloat16 ones: relative error about 4e-6, at most 5e-5.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Grosse et al. 2023 (arXiv:2308.03296), eq. 20 and section 3.2, for rank-one gradients.
    """
    check_tensors(a1=a1, delta1=delta1, a2=a2, delta2=delta2, weight=weight)
    check_flag("bias", bias)
    x1, d1, mask1 = check_pair(a1, delta1, mask1, suffix="1")
    x2, d2, mask2 = check_pair(a2, delta2, mask2, suffix="2")
    check_shape("weight", weight, "(O,I')", (d1.shape[-1], features(a1, bias)))
    check_shape("a1", x1, "(M,1,I)", (x1.shape[0], 1, x1.shape[2]))
    check_shape("a2", x2, "(N,1,I)", (x2.shape[0], 1, x1.shape[2]))
    check_shape("delta2", d2, "(N,1,O)", (x2.shape[0], 1, d1.shape[2]))
    result: Tensor = _op(x1, d1, x2, d2, weight, mask1, mask2, bias)
    return result


def reference(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    dtype = compute_dtype(a1, delta1, a2, delta2, weight)
    x1, d1 = read_tokens(a1, mask1, bias, dtype), read_tokens(delta1, mask1, False, dtype)
    x2, d2 = read_tokens(a2, mask2, bias, dtype)[:, 0], read_tokens(delta2, mask2, False, dtype)[:, 0]
    out = x1.new_empty(x1.shape[0], x2.shape[0])
    for m in range(x1.shape[0]):
        out[m] = ((d2 * d1[m]) @ weight.to(dtype) * (x2 * x1[m])).sum(1)
    return out


def fake(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    return a1.new_empty(a1.shape[0], a2.shape[0], dtype=compute_dtype(a1, delta1, a2, delta2, weight))


def native(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    weight: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    out = fake(a1, delta1, a2, delta2, weight, mask1, mask2, bias)
    if weight.numel() == 0:
        return out.zero_()
    precision = "highest" if torch.get_float32_matmul_precision() == "highest" else "high"
    _native.weighted_ghost_dot(
        out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, precision, torch.get_num_threads()
    )
    return out


_op = Op(
    "weighted_ghost_dot",
    "(Tensor a1, Tensor delta1, Tensor a2, Tensor delta2, Tensor weight, Tensor? mask1, Tensor? mask2, bool bias)"
    " -> Tensor",
    {"reference": reference, "native": native},
    fake=fake,
)
