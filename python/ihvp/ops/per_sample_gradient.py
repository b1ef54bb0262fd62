"""g_n = sum_t delta a^T, for those who need it whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import check_flag, check_pair, check_tensors, compute_dtype, features, read_tokens
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


def per_sample_gradient(a: Tensor, delta: Tensor, *, mask: Tensor | None = None, bias: bool = False) -> Tensor:
    """Per-example gradients of a layer: g[n] = sum_t delta[n,t] a[n,t]^T, weights then bias as the last column.

    Args:
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. float32, float64,
            bfloat16 or float16, any strides.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1, I' = I + 1.

    Returns:
        (N,O,I'), float64 if an operand is, float32 otherwise.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        their example's largest.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: Goodfellow 2015 (arXiv:1510.01799), section 3.
    """
    check_tensors(a=a, delta=delta)
    check_flag("bias", bias)
    x, d, mask = check_pair(a, delta, mask)
    result: Tensor = _op(x, d, mask, bias)
    return result


def reference(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    dtype = compute_dtype(a, delta)
    return read_tokens(delta, mask, False, dtype).mT @ read_tokens(a, mask, bias, dtype)


def fake(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    return a.new_empty(a.shape[0], delta.shape[2], features(a, bias), dtype=compute_dtype(a, delta))


def native(a: Tensor, delta: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    out = fake(a, delta, mask, bias)
    if a.shape[1] == 0:
        return out.zero_()
    _native.per_sample_gradient(out, a, delta, mask, bias, torch.get_num_threads())
    return out


_op = Op(
    "per_sample_gradient",
    "(Tensor a, Tensor delta, Tensor? mask, bool bias) -> Tensor",
    {"reference": reference, "native": native, "triton": triton("per_sample_gradient")},
    fake=fake,
)
