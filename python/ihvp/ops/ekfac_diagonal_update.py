"""Lambda += sum_n (U_G^T g_n U_A)^2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    check_accumulator,
    check_flag,
    check_pair,
    check_shape,
    check_tensors,
    features,
    read_tokens,
)
from ihvp.ops._gpu import cuda, triton
from ihvp.ops._precision import float32_products
from ihvp.ops._registry import Candidate, Op, packing, short
from ihvp.ops._rows import alike


def ekfac_diagonal_update_(
    Lambda: Tensor,
    a: Tensor,
    delta: Tensor,
    U_A: Tensor | None,
    U_G: Tensor | None,
    *,
    mask: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Add the eigenvalue-corrected diagonal of a batch to a running sum, in place.

    Lambda += sum_n (U_G^T g_n U_A)^2 elementwise, with g_n = sum_t delta[n,t] a[n,t]^T. The square is taken per
    example, after the sum over positions. No (N,O,I') tensor exists; the extra memory does not grow with N.

    Args:
        Lambda: (O,I') float32 or float64; float64 if an operand is.
        a: (N,T,I) or (N,I) layer inputs; delta: (N,T,O) or (N,O) gradients at the layer's output. float32, float64,
            bfloat16 or float16, any strides.
        U_A, U_G: (I',I') and (O,O) eigenvectors in columns. None for both: the standard basis, which makes this
            the diagonal of the Fisher matrix itself.
        mask: (N,T) bool, True at real positions; None: all are.
        bias: a carries an implicit last feature 1, I' = I + 1.

    Returns:
        Lambda. Products and a batch's sums are float32 (float64 for float64 operands), summed over at most 1,024
        positions before they are added to Lambda in its own type. The same bits for any number of threads.
        Where torch's float32 matmul precision is not "highest", its default, processors with AVX512-VNNI read tokens,
        as they are and projected, and bases as 16-bit integers: a relative error (norms) of about 1e-4, and of up to
        1e-3 where all numbers of a column round alike.
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        their example's largest.

    Raises:
        TypeError, ValueError: an argument of another type, shape or device, named with what was expected.

    Source: George et al. 2018 (arXiv:1806.03884), eq. 9: s_i* = E[(U_A (x) U_G)^T grad]_i^2.
    """
    check_tensors({"U_A": U_A, "U_G": U_G}, Lambda=Lambda, a=a, delta=delta)
    check_flag("bias", bias)
    tokens_a, tokens_delta, mask = check_pair(a, delta, mask)
    I, O = features(a, bias), delta.shape[-1]
    check_shape("Lambda", Lambda, "(O,I')", (O, I))
    check_shape("U_A", U_A, "(I',I')", (I, I))
    check_shape("U_G", U_G, "(O,O)", (O, O))
    if (U_A is None) != (U_G is None):
        raise ValueError("U_A and U_G must both be given or both be None")
    check_accumulator("Lambda", Lambda, a, delta, U_A, U_G)
    _op(Lambda, tokens_a, tokens_delta, U_A, U_G, mask, bias)
    return Lambda


def reference(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    x, d = read_tokens(a, mask, bias, Lambda.dtype), read_tokens(delta, mask, False, Lambda.dtype)
    if U_A is not None and U_G is not None:
        x, d = x @ U_A.to(x.dtype), d @ U_G.to(d.dtype)
    for n in range(x.shape[0]):
        Lambda += (d[n].T @ x[n]).square()


def candidates(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> Sequence[Candidate]:
    N, T, _ = a.shape
    O, I = Lambda.shape
    item = 8 if a.dtype == torch.float64 else 4
    p, M = O * I, N * T
    chunk = max(T, min(M, 1024))
    basis = O * O + I * I if U_A is not None else 0
    read = item * (M * (O + I) + p)
    once = packing(basis + M * (O + I))
    narrow = float32_products() == "int16" and item == 4 and T >= 16
    project = Candidate(
        "project_first",
        2 * M * (basis + p),
        read + item * basis,
        item * (chunk * (O + I) + basis),
        once + (short(2 * M * p, T) if T > 1 else 0),
        0.4 * 2 * M * (basis + p) if narrow else 0.0,
    )
    if U_A is None or T == 1:
        return [project]
    gradient = Candidate(
        "gradient_first",
        2 * M * p + 2 * N * p * (O + I),
        read + item * basis,
        item * (2 * p + basis),
        once + packing(3 * N * p),
    )
    return [project, gradient]


def native(
    Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, mask: Tensor | None, bias: bool
) -> None:
    order = _op.best(Lambda, a, delta, U_A, U_G, mask, bias)
    precision, threads = float32_products(), torch.get_num_threads()
    _native.ekfac_diagonal_update(Lambda, a, delta, U_A, U_G, mask, bias, order, precision, threads)


def beyond_cuda(Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor | None, U_G: Tensor | None, *_: object) -> str:
    """Projected tokens are rounded to 16 bits at torch's "medium" float32 matmul precision alone, squares never."""
    bases = [U for U in (U_A, U_G) if U is not None]
    if not alike(a, delta, *bases):
        return "operands that are not of one 16-bit type"
    if a.shape[1] == 1:
        return "a single position"
    if bases and torch.get_float32_matmul_precision() != "medium":
        return 'bases at another float32 matmul precision than "medium"'
    return ""


_op = Op(
    "ekfac_diagonal_update_",
    "(Tensor(a!) Lambda, Tensor a, Tensor delta, Tensor? U_A, Tensor? U_G, Tensor? mask, bool bias) -> ()",
    {
        "reference": reference,
        "native": native,
        "triton": triton("ekfac_diagonal_update"),
        "cuda": cuda("ekfac_diagonal_update", beyond_cuda),
    },
    fake=lambda Lambda, a, delta, U_A, U_G, mask, bias: None,
    candidates=candidates,
)
