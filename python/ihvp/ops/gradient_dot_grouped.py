"""S = sum over layers of `gradient_dot`, for many small layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ihvp import _native
from ihvp.ops._arguments import (
    as_tokens,
    check_flag,
    check_pair,
    check_shape,
    check_tensors,
    compute_dtype,
    features,
    plain,
)
from ihvp.ops._gpu import triton
from ihvp.ops._registry import Op
from ihvp.ops.gradient_dot import gradient_dot


def gradient_dot_grouped(
    P: Sequence[Tensor],
    a: Sequence[Tensor],
    delta: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    bias: bool = False,
) -> Tensor:
    """Scores summed over a group of layers: S[q,n] = sum_l <P_l[q], g_l[n]>.

    For many small layers, adapters above all, that see the same positions: on a GPU one launch serves them all, where a
    loop over `gradient_dot` would spend its time in launches. A caller collects the tokens of a group's layers until
    the last has come.

    Args:
        P: for each layer (Q,O_l,I'_l) queries. All tensors are float32, float64, bfloat16 or float16.
        a, delta: for each layer (N,T,I_l) or (N,I_l) inputs and (N,T,O_l) or (N,O_l) output gradients. N, T and Q are
            the same in all layers, and so are the dtypes of each argument; widths differ freely. Any strides.
        mask: (N,T) bool of all layers, True at real positions; None: all are.
        bias: every a carries an implicit last feature 1.

    Returns:
        (Q,N), float64 if an operand is, float32 otherwise.

    Raises:
        TypeError, ValueError: no layer, lists of different lengths, or an argument of another type, shape or device,
        named with its layer's number.

    Source: Grosse et al. 2023 (arXiv:2308.03296), eq. 5, over a block-diagonal curvature.
    """
    check_flag("bias", bias)
    check_group(P=P, a=a, delta=delta)
    first, _, mask = check_pair(a[0], delta[0], mask, suffix="[0]")
    if a[0].dim() == 2:
        a, delta = [as_tokens("a", x) for x in a], [as_tokens("delta", d) for d in delta]
    N, T, _ = first.shape
    if not _fits(P, a, delta, (N, T), bias):
        for layer, (x, d) in enumerate(zip(a, delta, strict=True)):
            check_pair(x, d, mask, suffix=f"[{layer}]")
            check_shape(f"a[{layer}]", x, "(N,T,I)", (N, T, x.shape[2]))
            check_shape(f"P[{layer}]", P[layer], "(Q,O,I')", (P[0].shape[0], d.shape[2], features(x, bias)))
    result: Tensor = _op(list(P), list(a), list(delta), mask, bias)
    return result


def _fits(
    P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], positions: tuple[int, int], bias: bool
) -> bool:
    """A quick look at all shapes at once: hundreds of layers come with every batch."""
    (N, T), Q = positions, P[0].shape[0]
    for p, x, d in zip(P, a, delta, strict=True):
        if p.dim() != 3:
            return False
        queries, O, I = p.shape
        if queries != Q or x.shape != (N, T, I - bias) or d.shape != (N, T, O):
            return False
    return True


def check_group(**lists: Sequence[Tensor]) -> None:
    """Equally long lists of tensors, each of one dtype; all on one device."""
    first, members = next(iter(lists.items()))
    if isinstance(members, Tensor) or len(members) == 0:
        raise ValueError(f"{first} must be a list of one tensor a layer, got {members!r:.80}")
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or len(tensors) != len(members):
            raise ValueError(f"{name} must be a list of {len(members)} tensors as {first} is, got {len(tensors)}")
    if plain(chain.from_iterable(lists.values())) and all(_alike(tensors) for tensors in lists.values()):
        return
    named = {f"{name}[{layer}]": x for name, tensors in lists.items() for layer, x in enumerate(tensors)}
    check_tensors(None, **named)
    for name, x in named.items():
        kind = lists[name.partition("[")[0]][0].dtype
        if x.dtype != kind:
            raise TypeError(f"{name} must be {kind} as its first layer is, got {x.dtype}")


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({x.dtype for x in tensors}) == 1


def reference(
    P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], mask: Tensor | None, bias: bool
) -> Tensor:
    out = fake(P, a, delta, mask, bias).zero_()
    for layer in range(len(P)):
        out += gradient_dot(P[layer], a[layer], delta[layer], mask=mask, bias=bias)
    return out


def fake(P: Sequence[Tensor], a: Sequence[Tensor], delta: Sequence[Tensor], mask: Tensor | None, bias: bool) -> Tensor:
    return P[0].new_empty(P[0].shape[0], a[0].shape[0], dtype=compute_dtype(P[0], a[0], delta[0]))


def native(P: list[Tensor], a: list[Tensor], delta: list[Tensor], mask: Tensor | None, bias: bool) -> Tensor:
    out = fake(P, a, delta, mask, bias)
    if a[0].shape[1] == 0 or all(x.shape[1] * x.shape[2] == 0 for x in P):
        return out.zero_()
    _native.gradient_dot_grouped(out, P, a, delta, mask, bias, torch.get_num_threads())
    return out


_op = Op(
    "gradient_dot_grouped",
    "(Tensor[] P, Tensor[] a, Tensor[] delta, Tensor? mask, bool bias) -> Tensor",
    {
        "reference": reference,
        "native": native,
        "triton": triton("gradient_dot_grouped"),
    },
    fake=fake,
)
