"""||g_n||^2 from Gram products."""

from __future__ import annotations

from torch import Tensor

from ihvp.ops._arguments import check_flag, check_pair, check_tensors, compute_dtype, read_tokens
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op


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


_op = Op(
    "ghost_norm",
    "(Tensor a, Tensor delta, Tensor? mask, bool bias) -> Tensor",
    {"reference": reference, "triton": triton("ghost_norm")},
    fake=lambda a, delta, mask, bias: a.new_empty(a.shape[0], dtype=compute_dtype(a, delta)),
)
