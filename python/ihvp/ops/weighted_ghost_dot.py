"""sum_oi weight g_m g_n at T = 1, from rank-one gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
from ihvp.ops._gpu import triton
from ihvp.ops._precision import cpu_precision
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
        (M,N), float64 if an operand is, float32 otherwise. The same bits for any number of threads. The relative error
        (norms) is at most about 1e-5 in float32: 1e-6, or 5e-6 where fixed point serves. Where
        `torch.get_float32_matmul_precision()` is not "highest", torch's default, it may be that of TF32 ("high", about
        1e-4) or of bfloat16 ("medium", about 3e-3).
        On CUDA devices torch's float32 matmul precision below "highest" rounds operands to 11 bits, as
        TF32 does. At "highest" the Triton kernel reads float32 numbers as two of float16: 22 bits down to 2^-18 of
        their example's largest.

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
    run, threads = _native.weighted_ghost_dot, torch.get_num_threads()
    if out.dtype == torch.float32 and _native.isa() in NARROW and weight.numel() >= TILED and out.numel() >= TILED:
        split = split_weight(weight)
        if split is not None:
            x1, d1 = read_tokens(a1, mask1, bias, out.dtype), read_tokens(delta1, mask1, False, out.dtype)
            x2, d2 = read_tokens(a2, mask2, bias, out.dtype), read_tokens(delta2, mask2, False, out.dtype)
            scaled, precision = _narrow(split, x1[:, 0], d1[:, 0], x2[:, 0], d2[:, 0])
            if precision != "float32":
                x1, d1 = x1 * scaled.columns, d1 * scaled.rows
                run(out, x1, d1, x2, d2, scaled.residual, None, None, False, precision, threads)
                given = float(out.norm())
                out.add_(_low_rank(x1[:, 0], d1[:, 0], x2[:, 0], d2[:, 0], scaled))
                if precision != "int16" or not given > _most_given() * float(out.norm()):
                    return out
    run(out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, "float32", threads)
    return out


NARROW = ("amx", "avx512bf16", "avx512vnni")  # instruction sets on which narrower numbers are faster
TILED = 4096  # elements of the weight and of the result from which tiles pay
MOST_RANK = 8  # of the smooth part
SMALL_SHARE, MOST_SHARE = 0.04, 0.1  # of the residual in the weight: wanted, and borne by bfloat16 pieces
FIXED_POINT_SHARE = 0.05  # of the residual in the weight, up to which fixed point is accurate to 1e-5
FIXED_POINT_SIDE = {"int8x3": 257, "int16": 128}  # of the weight, from which it pays


@dataclass(frozen=True)
class SplitWeight:
    """weight = rows columns * (left right + residual): a smooth part of low rank, and a residual small beside it.

    1 / (Lambda + damping) follows the eigenvalues of G and A up to the noise of a finite sample: scaled by its rows'
    and columns' geometric means and without a few singular directions it is a few per cent of itself, and so is the
    error of computing with it in narrower numbers.
    """

    rows: Tensor  # (O,)
    columns: Tensor  # (I',)
    left: Tensor  # (O,rank)
    right: Tensor  # (rank,I')
    residual: Tensor  # (O,I')
    energies: tuple[Tensor, Tensor]  # (O,), (I'): sums of the residual's squares
    share: float  # the residual's norm over that of all in the brackets


_splits = WeakTensorKeyDictionary()  # weight -> (version, SplitWeight or None)


def split_weight(weight: Tensor) -> SplitWeight | None:
    """The split of a weight, remembered while that tensor lives unchanged. None where it would not gain accuracy."""
    if weight.is_inference():
        return _split(weight)
    known: tuple[int, SplitWeight | None] | None = _splits.get(weight)
    if known is None or known[0] != weight._version:
        known = weight._version, _split(weight)
        _splits[weight] = known
    return known[1]


def _split(weight: Tensor) -> SplitWeight | None:
    weight = weight.float()
    logarithm = weight.log()
    if not bool(logarithm.sum().isfinite()):  # a number that is not positive and finite
        return None
    mean_columns = logarithm.mean(0)
    rows, columns = (logarithm.mean(1) - mean_columns.mean()).exp(), mean_columns.exp()
    # In float64: outside the reach of torch's float32 matmul precision.
    scaled = (weight / rows.unsqueeze(1)).div_(columns).double()
    # Subspace iteration from cosines: deterministic, and the wanted directions are smooth in the eigenvalues' order.
    grid = torch.arange(scaled.shape[1], dtype=torch.float64).unsqueeze(1) + 0.5
    basis = torch.cos(torch.pi / scaled.shape[1] * grid * torch.arange(min(MOST_RANK, *scaled.shape)))
    for _ in range(2):
        left = torch.linalg.qr(scaled @ basis)[0]
        basis = torch.linalg.qr(scaled.T @ left)[0]
    turn, singular, right = torch.linalg.svd(scaled @ basis, full_matrices=False)
    left, right = turn * singular, right @ basis.T
    # The fewest directions that leave a small residual: only then are products of bfloat16 pieces accurate.
    norm = float(scaled.norm())
    left_over = norm**2 - singular.square().cumsum(0)
    rank = int((left_over > (SMALL_SHARE * norm) ** 2).sum()) + 1
    left, right = left[:, :rank], right[:rank]
    residual = scaled.addmm_(left, right, alpha=-1).float()
    squares = residual.square()
    energies = squares.sum(1).double(), squares.sum(0).double()
    share = float(energies[0].sum().sqrt()) / norm
    if not share <= MOST_SHARE:
        return None
    rows, columns, left, right = (x.float() for x in (rows, columns, left, right))
    return SplitWeight(rows, columns, left, right, residual, energies, share)


def _most_given() -> float:
    """What 16-bit integers may give of a result's norm: there is a relative error of 1e-4 in it."""
    return 0.1 if cpu_precision() == "highest" else 1.0


def _narrow(split: SplitWeight, x1: Tensor, d1: Tensor, x2: Tensor, d2: Tensor) -> tuple[SplitWeight, str]:
    """How the residual is multiplied, and the split scaled for that. "float32": as a part of the whole weight."""
    tiles, highest = _native.isa() == "amx", cpu_precision() == "highest"
    if tiles and not highest:
        return split, "bf16"
    fixed, wide = ("int8x3", "bf16x3") if tiles else ("int16", "float32")
    small = split.share <= FIXED_POINT_SHARE or not highest
    pays = min(split.residual.shape) >= FIXED_POINT_SIDE[fixed] and (tiles or min(len(x1), len(x2)) > 1)
    balanced = _balanced(split, x1, d1, x2, d2) if small and pays else None
    return (split, wide) if balanced is None else (balanced, fixed)


def _balanced(split: SplitWeight, x1: Tensor, d1: Tensor, x2: Tensor, d2: Tensor) -> SplitWeight | None:
    """The same weight, its rows and columns scaled for fixed point: products of tokens and residual spread alike.

    None for tokens that are all zero, or not finite.
    """
    squares_d, squares_x = (
        (one.square().sum(0) * other.square().sum(0)).double() for one, other in ((d1, d2), (x1, x2))
    )
    rows = _scale(split.energies[0], squares_d * split.rows.square())
    columns = _scale(split.energies[1], squares_x * split.columns.square())
    if not bool((columns.sum() + rows.sum()).isfinite()):
        return None
    return replace(
        split,
        rows=split.rows * rows,
        columns=split.columns * columns,
        left=split.left / rows.unsqueeze(1),
        right=split.right / columns,
        residual=(split.residual * rows.reciprocal().unsqueeze(1)).mul_(columns.reciprocal()),
    )


def _scale(energy: Tensor, squares: Tensor) -> Tensor:
    """(energy / squares)^(1/4), away from division by zero."""
    return ((energy + 1e-12 * energy.max()) / (squares + 1e-12 * squares.max())).pow(0.25).float()


def _low_rank(x1: Tensor, d1: Tensor, x2: Tensor, d2: Tensor, split: SplitWeight) -> Tensor:
    """sum_r (d1 left_r . d2) (x1 right_r . x2): Gram products."""
    M, N, r = x1.shape[0], x2.shape[0], split.left.shape[1]
    grams_d = (d1.unsqueeze(1) * split.left.T).flatten(0, 1) @ d2.T
    grams_x = (x1.unsqueeze(1) * split.right).flatten(0, 1) @ x2.T
    return (grams_d * grams_x).view(M, r, N).sum(1)


_op = Op(
    "weighted_ghost_dot",
    "(Tensor a1, Tensor delta1, Tensor a2, Tensor delta2, Tensor weight, Tensor? mask1, Tensor? mask2, bool bias)"
    " -> Tensor",
    {"reference": reference, "native": native, "triton": triton("weighted_ghost_dot")},
    fake=fake,
)
