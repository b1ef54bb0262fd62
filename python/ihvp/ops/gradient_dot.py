"""S[q,n] = <P_q, g_n>."""

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
from ihvp.ops._precision import float32_products
from ihvp.ops._registry import Candidate, Op, packing, padded, segments, short


def gradient_dot(
    P: Tensor,
    a: Tensor,
    delta: Tensor,
    *,
    mask: Tensor | None = None,
    bias: bool = False,
    per_token: bool = False,
) -> Tensor:
    """Dot products of queries with per-example gradients that are never formed whole.

    S[q,n] = <P_q, g_n> = sum_t delta[n,t]^T P_q a[n,t]; with `per_token` the terms S[q,n,t] themselves.

    Args:
        P: (Q,O,I') queries, usually preconditioned.
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. All float32,
            float64, bfloat16 or float16, any strides.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1, I' = I + 1.
        per_token: keep the positions apart.

    Returns:
        (Q,N), or (Q,N,T) with `per_token`; float64 if an operand is, float32 otherwise. The same bits for any number
        of threads.
        Where torch's float32 matmul precision is not "highest", its default, processors with AVX512-VNNI read
        tokens, and queries that meet them before there is a gradient, as 16-bit integers: a relative error (norms) of
        about 1e-4.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        their example's largest.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Grosse et al. 2023 (arXiv:2308.03296), eq. 5 and section 3.2.
    """
    check_tensors(P=P, a=a, delta=delta)
    check_flag("bias", bias)
    check_flag("per_token", per_token)
    tokens_a, tokens_delta, mask = check_pair(a, delta, mask)
    if P.dim() != 3:
        raise ValueError(f"P must be (Q,O,I'), got {shape_of(P)}")
    check_shape("P", P, "(Q,O,I')", (P.shape[0], delta.shape[-1], features(a, bias)))
    result: Tensor = _op(P, tokens_a, tokens_delta, mask, bias, per_token)
    return result


def reference(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    dtype = compute_dtype(P, a, delta)
    x, d = read_tokens(a, mask, bias, dtype), read_tokens(delta, mask, False, dtype)
    if per_token:
        return torch.stack([((d @ p) * x).sum(-1) for p in P.to(dtype)]) if len(P) else x.new_empty(0, *x.shape[:2])
    return P.to(dtype).flatten(1) @ (d.mT @ x).flatten(1).T


def fake(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    shape = (P.shape[0], *a.shape[:2]) if per_token else (P.shape[0], a.shape[0])
    return P.new_empty(*shape, dtype=compute_dtype(P, a, delta))


def candidates(
    P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool
) -> Sequence[Candidate]:
    N, T, _ = a.shape
    Q, O, I = P.shape
    item = 8 if compute_dtype(P, a, delta) == torch.float64 else 4
    narrow = item == 4 and float32_products() == "int16"
    p, M = O * I, N * T
    tokens = item * M * (O + I)
    chunk = max(T, min(M, 2048), 1)
    passes = max(1, M // chunk)
    rows = padded(N * T, 8)
    query = Candidate(
        "query_first",
        2 * Q * rows * O * padded(I, 16),
        item * Q * p * passes + tokens,
        item * (chunk * (O + I + Q) + O * 192),
        packing(0.3 * Q * p * passes + 0.6 * M * (O + I))  # P is packed between the tiles
        + short(2 * Q * rows * p, O)
        + 2e5 * Q,  # each is begun anew
        0.35 * 2 * Q * rows * p if narrow and O >= 32 else 0.0,
    )
    pairs = padded(Q * min(O, I), 8) * padded(M, 16)
    low_rank = Candidate(
        "low_rank",
        2 * pairs * (O + I),
        item * Q * p + tokens,
        item * 1024 * (O + I),
        packing(Q * p + 0.6 * M * (O + I)) + segments(pairs) + 2e6,  # the unit matrix
    )
    if per_token:
        return [query, low_rank]
    outputs, inputs = _block(Q, N, T, O, I)
    parts = -(-O // outputs) * -(-I // inputs)
    examples = padded(max(6, 36 // min(-(-8 // parts), max(1, -(-N // 6)))), 6)  # of a chunk
    passes = max(1, -(-N // examples))
    whole = padded(O, 8) * padded(I, 16)
    products, dots = 2 * M * whole, 2 * padded(Q, 4) * padded(N, 6) * O * padded(I, 16)
    again = M * (O * (-(-I // inputs) - 1) + I * (-(-O // outputs) - 1))  # from a nearer cache than the first time
    gradient = Candidate(
        "gradient_first",
        products + dots,
        item * Q * p * passes + tokens,
        item * outputs * inputs * examples,
        packing(0.6 * M * (O + I) + again / 2 + Q * p * passes / 8)
        + short(products, T)
        + 0.6 * dots,  # they wait for P
        0.4 * products if narrow and T >= 32 else 0.0,
    )
    return [query, gradient, low_rank]


def _block(Q: int, N: int, T: int, O: int, I: int) -> tuple[int, int]:
    """Outputs and inputs of a block of g in the native kernel: tokens are packed for every block that they enter."""
    wide = 4 if T <= 2 * Q else 2 if T <= 4 * Q else 1
    outputs, inputs = 192 // wide, 192 * wide
    chunks = max(1, -(-N // 6)) if wide == 1 else 1  # of examples, which blocks are taken beside
    while -(-O // outputs) * -(-I // inputs) * chunks < 8 and max(outputs // 24, inputs // 192) > 1:
        outputs, inputs = (outputs, inputs // 2) if inputs > 192 else (outputs // 2, inputs)
    return outputs, inputs


def cheapest(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Candidate:
    """For ops that end in this one; only the shape of P counts."""
    threads = torch.get_num_threads()
    wide = compute_dtype(P, a, delta) == torch.float64
    return min(candidates(P, a, delta, mask, bias, per_token), key=lambda one: one.seconds(wide, threads))


def native(P: Tensor, a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool, per_token: bool) -> Tensor:
    out = fake(P, a, delta, mask, bias, per_token)
    if a.shape[1] * P.shape[1] * P.shape[2] == 0:
        return out.zero_()
    order, threads = _op.best(P, a, delta, mask, bias, per_token), torch.get_num_threads()
    if order == "low_rank":  # P_q = 1 P_q = P_q 1: with few outputs or inputs, ghost dot products of as many positions
        Q, O, I = P.shape
        unit = torch.eye(min(O, I), dtype=out.dtype).expand(Q, -1, -1)
        x, d = (P, unit) if O <= I else (unit, P.mT)
        _native.ghost_dot(out, x, d, a, delta, None, mask, False, bias, per_token, threads)
    else:
        _native.gradient_dot(out, P, a, delta, mask, bias, per_token, order, float32_products(), threads)
    return out


_op = Op(
    "gradient_dot",
    "(Tensor P, Tensor a, Tensor delta, Tensor? mask, bool bias, bool per_token) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("gradient_dot")},
    fake=fake,
    candidates=candidates,
)
