"""S[q,n] = <L_q R_q, g_n>."""

from __future__ import annotations

from collections.abc import Sequence

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
    shape_of,
)
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Candidate, Op, packing, padded, segments, short
from ihvp.ops.gradient_dot import cheapest as gradient_dot_best
from ihvp.ops.gradient_dot import native as gradient_dot
from ihvp.ops.per_sample_gradient import native as per_sample_gradient


def gradient_dot_low_rank(
    L: Tensor,
    R: Tensor,
    a: Tensor,
    delta: Tensor,
    *,
    mask: Tensor | None = None,
    bias: bool = False,
    per_token: bool = False,
) -> Tensor:
    """`gradient_dot` for queries of rank r, P_q = L_q R_q, without forming P_q.

    S[q,n] = sum_t (L_q^T delta[n,t])^T (R_q a[n,t]); with `per_token` the terms S[q,n,t].

    Args:
        L: (Q,O,r); R: (Q,r,I').
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. All float32,
            float64, bfloat16 or float16, any strides.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1, I' = I + 1.
        per_token: keep the positions apart.

    Returns:
        (Q,N), or (Q,N,T) with `per_token`; float64 if an operand is, float32 otherwise.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to TF32's 11 bits, 2^-11 each.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Grosse et al. 2023 (arXiv:2308.03296), section 3.2.2, query batching by low-rank factors.
    """
    check_tensors(L=L, R=R, a=a, delta=delta)
    check_flag("bias", bias)
    check_flag("per_token", per_token)
    tokens_a, tokens_delta, mask = check_pair(a, delta, mask)
    if L.dim() != 3:
        raise ValueError(f"L must be (Q,O,r), got {shape_of(L)}")
    Q, _, r = L.shape
    check_shape("L", L, "(Q,O,r)", (Q, delta.shape[-1], r))
    check_shape("R", R, "(Q,r,I')", (Q, r, features(a, bias)))
    result: Tensor = _op(L, R, tokens_a, tokens_delta, mask, bias, per_token)
    return result


def reference(
    L: Tensor, R: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool
) -> Tensor:
    dtype = compute_dtype(L, R, a, delta)
    x, d = read_tokens(a, mask, bias, dtype), read_tokens(delta, mask, False, dtype)
    out = fake(L, R, a, delta, mask, bias, per_token)
    for q in range(L.shape[0]):
        terms = ((d @ L[q].to(dtype)) * (x @ R[q].to(dtype).T)).sum(-1)
        out[q] = terms if per_token else terms.sum(-1)
    return out


def fake(L: Tensor, R: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    shape = (L.shape[0], *a.shape[:2]) if per_token else (L.shape[0], a.shape[0])
    return L.new_empty(*shape, dtype=compute_dtype(L, R, a, delta))


def candidates(
    L: Tensor, R: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool
) -> Sequence[Candidate]:
    (Q, O, r), I = L.shape, R.shape[2]
    N, T, _ = a.shape
    item = 8 if compute_dtype(L, R, a, delta) == torch.float64 else 4
    tokens = item * N * T * (O + I)
    pairs = padded(Q * r, 8) * padded(N * T, 16)
    overhead = packing(0.6 * tokens / item) + segments(pairs)
    low = Candidate("low_rank", 2 * pairs * (O + I), tokens, item * 1024 * (O + I), overhead)
    if Q * O * I > 2**26:  # P would take more than its worth of memory
        return [low]
    P = item * Q * O * I
    shape_only = L.new_empty(()).expand(Q, O, I)
    dots = gradient_dot_best(shape_only, a, delta, mask, bias, per_token)
    dense = Candidate(
        "dense",
        2 * Q * r * O * I + dots.flops,
        2 * P + dots.bytes,
        P + dots.workspace,
        packing(Q * O * I) + short(2 * Q * r * O * I, r) + dots.overhead,
    )
    return [low, dense]


def native(L: Tensor, R: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    """A query of rank r is an example of r positions: its tokens are the columns of L and the rows of R."""
    out = fake(L, R, a, delta, mask, bias, per_token)
    if a.shape[1] * L.shape[1] * L.shape[2] * R.shape[2] == 0:
        return out.zero_()
    if _op.best(L, R, a, delta, mask, bias, per_token) == "dense":
        P = per_sample_gradient(R.to(out.dtype), L.mT, None, False)  # as wide as the result
        return gradient_dot(P, a, delta, mask, bias, per_token)
    _native.ghost_dot(out, R, L.mT, a, delta, None, mask, False, bias, per_token, torch.get_num_threads())
    return out


_op = Op(
    "gradient_dot_low_rank",
    "(Tensor L, Tensor R, Tensor a, Tensor delta, Tensor? mask, bool bias, bool per_token) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("gradient_dot_low_rank")},
    fake=fake,
    candidates=candidates,
)
