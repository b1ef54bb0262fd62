"""S[q,n] = <L_q R_q, g_n>."""

from __future__ import annotations

from torch import Tensor

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
from ihvp.ops._registry import Op


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
    return L.new_empty(shape, dtype=compute_dtype(L, R, a, delta))


_op = Op(
    "gradient_dot_low_rank",
    "(Tensor L, Tensor R, Tensor a, Tensor delta, Tensor? mask, bool bias, bool per_token) -> Tensor",
    {"reference": reference, "triton": triton("gradient_dot_low_rank")},
    fake=fake,
)
