"""||g_n||^2 from Gram products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import check_flag, check_pair, check_tensors, compute_dtype, features, read_tokens
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Candidate, Op, packing, padded, short


def ghost_norm(a: Tensor, delta: Tensor, *, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    """Squared norms of per-example gradients, without forming them.

    out[n] = ||g_n||^2 = sum_{s,t} (delta[n,s] . delta[n,t]) (a[n,s] . a[n,t]).

    Args:
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. float32, float64,
            bfloat16 or float16, any strides.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1.

    Returns:
        (N,), float64 if an operand is, float32 otherwise.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to TF32's 11 bits, 2^-11 each.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Goodfellow 2015 (arXiv:1510.01799), section 4.
    """
    check_tensors(a=a, delta=delta)
    check_flag("bias", bias)
    x, d, mask = check_pair(a, delta, mask)
    result: Tensor = _op(x, d, mask, bias)
    return result


def reference(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    dtype = compute_dtype(a, delta)
    x, d = read_tokens(a, mask, bias, dtype), read_tokens(delta, mask, False, dtype)
    return ((x @ x.mT) * (d @ d.mT)).sum((1, 2))


def fake(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    return a.new_empty(a.shape[0], dtype=compute_dtype(a, delta))


def candidates(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Sequence[Candidate]:
    N, T, _ = a.shape
    I, O = features(a, bias), delta.shape[2]
    item = 8 if compute_dtype(a, delta) == torch.float64 else 4
    tokens, p = item * N * T * (O + I), O * I
    pairs = N * (padded(T, 8) * padded(T, 16) if T <= 48 else T * (T + 48) / 2) if T > 1 else N
    return [
        Candidate("ghost", 2 * pairs * (O + I), tokens, 2 * item * min(T, 192) * (O + I), packing(N * T * (O + I))),
        Candidate(
            "gradient_first",
            2 * N * T * p,
            tokens + item * p,
            item * (1024 * (O + I) + p),
            packing(1.25 * N * T * (O + I) + p) + short(2 * N * T * p, T) / 2 + 0.6 * N * T * p,  # 0.8 of the peak
        ),
    ]


def native(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = fake(a, delta, mask, bias)
    I, O = features(a, bias), delta.shape[2]
    if a.shape[1] * I * O == 0:
        return out.zero_()
    if _op.best(a, delta, mask, bias) == "ghost":
        _native.ghost_norm(out, a, delta, mask, bias, torch.get_num_threads())
    else:  # the self-influence under the identity
        ones = out.new_ones(()).expand(O, I)
        _native.ekfac_self_influence(out, a, delta, None, None, ones, 0.0, mask, bias, torch.get_num_threads())
    return out


_op = Op(
    "ghost_norm",
    "(Tensor a, Tensor delta, Tensor? mask, bool bias) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("ghost_norm")},
    fake=fake,
    candidates=candidates,
)
