"""<g_m, g_n> from Gram products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    check_flag,
    check_pair,
    check_tensors,
    compute_dtype,
    features,
    read_tokens,
)
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Candidate, Op, packing, padded, segments, short
from ihvp.ops.gradient_dot import cheapest as gradient_dot_best
from ihvp.ops.gradient_dot import native as gradient_dot
from ihvp.ops.per_sample_gradient import native as per_sample_gradient


def ghost_dot(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    *,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Dot products of the per-example gradients of two sets, without forming them.

    S[m,n] = <g_m, g_n> = sum_{s,t} (delta1[m,s] . delta2[n,t]) (a1[m,s] . a2[n,t]).

    Args:
        a1: (M,T1,I) or (M,I), delta1: (M,T1,O) or (M,O); a2: (N,T2,I) or (N,I), delta2: (N,T2,O) or (N,O).
            float32, float64, bfloat16 or float16, any strides.
        mask1, mask2: (M,T1), (N,T2) bool, True at real positions; None: all are.
        bias: a1 and a2 carry an implicit last feature 1.

    Returns:
        (M,N), float64 if an operand is, float32 otherwise.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to TF32's 11 bits, 2^-11 each.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Goodfellow 2015 (arXiv:1510.01799) for norms; Grosse et al. 2023 (arXiv:2308.03296), section 3.2.
    """
    check_tensors(a1=a1, delta1=delta1, a2=a2, delta2=delta2)
    check_flag("bias", bias)
    x1, d1, mask1 = check_pair(a1, delta1, mask1, suffix="1")
    x2, d2, mask2 = check_pair(a2, delta2, mask2, suffix="2")
    if x2.shape[-1] != x1.shape[-1] or d2.shape[-1] != d1.shape[-1]:
        raise ValueError(
            f"a2 and delta2 must have the features of a1 and delta1, I={x1.shape[-1]} and O={d1.shape[-1]}, "
            f"got I={x2.shape[-1]} and O={d2.shape[-1]}"
        )
    result: Tensor = _op(x1, d1, x2, d2, mask1, mask2, bias)
    return result


def reference(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    dtype = compute_dtype(a1, delta1, a2, delta2)
    x1, d1 = read_tokens(a1, mask1, bias, dtype), read_tokens(delta1, mask1, False, dtype)
    x2, d2 = read_tokens(a2, mask2, bias, dtype), read_tokens(delta2, mask2, False, dtype)
    out = x1.new_empty(x1.shape[0], x2.shape[0])
    for m in range(x1.shape[0]):
        out[m] = ((d2 @ d1[m].T) * (x2 @ x1[m].T)).sum((1, 2))
    return out


def fake(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    return a1.new_empty(a1.shape[0], a2.shape[0], dtype=compute_dtype(a1, delta1, a2, delta2))


def candidates(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Sequence[Candidate]:
    (M, T1, _), (N, T2, _) = a1.shape, a2.shape
    I, O = features(a1, bias), delta1.shape[2]
    item = 8 if compute_dtype(a1, delta1, a2, delta2) == torch.float64 else 4
    p, tokens = O * I, item * (M * T1 + N * T2) * (O + I)
    pairs = padded(M * T1, 8) * padded(N * T2, 16)
    step = _block(M, p)
    shape_only = a1.new_empty(()).expand(step, O, I)
    dots = gradient_dot_best(shape_only, a2, delta2, mask2, bias, False)
    blocks = max(1, M // step)
    overhead = packing(tokens / item) + segments(pairs)
    return [
        Candidate("ghost", 2 * pairs * (O + I), tokens, item * 1024 * (O + I), overhead),
        Candidate(
            "gradient_first",
            2 * M * T1 * p + blocks * dots.flops,
            item * M * p + blocks * dots.bytes,
            item * step * p + dots.workspace,
            packing(M * T1 * (O + I) + 1.5 * M * p) + short(2 * M * T1 * p, T1) + blocks * dots.overhead,
        ),
    ]


def _block(M: int, p: int) -> int:
    """Gradients of the first set held at a time: 16 million numbers."""
    return max(1, min(M, 2**24 // max(p, 1)))


def native(
    a1: Tensor,
    delta1: Tensor,
    a2: Tensor,
    delta2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    bias: bool,
) -> Tensor:
    out = fake(a1, delta1, a2, delta2, mask1, mask2, bias)
    I, O = features(a1, bias), delta1.shape[2]
    if a1.shape[1] * a2.shape[1] * I * O == 0:
        return out.zero_()
    threads = torch.get_num_threads()
    if _op.best(a1, delta1, a2, delta2, mask1, mask2, bias) == "ghost":
        _native.ghost_dot(out, a1, delta1, a2, delta2, mask1, mask2, bias, bias, False, threads)
        return out
    step = _block(a1.shape[0], I * O)
    for first in range(0, a1.shape[0], step):
        some = slice(first, first + step)
        mask = None if mask1 is None else mask1[some]
        P = per_sample_gradient(a1[some].to(out.dtype), delta1[some], mask, bias)  # as wide as the result
        out[some] = gradient_dot(P, a2, delta2, mask2, bias, False)
    return out


_op = Op(
    "ghost_dot",
    "(Tensor a1, Tensor delta1, Tensor a2, Tensor delta2, Tensor? mask1, Tensor? mask2, bool bias) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("ghost_dot")},
    fake=fake,
    candidates=candidates,
)
