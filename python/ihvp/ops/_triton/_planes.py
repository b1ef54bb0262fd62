"""Tokens and matrices as tensor cores read them: planes of 16-bit numbers, fetched by tensor descriptors.

A float32 number is the sum of two float16 ones, after a scaling by a power of two that brings the largest finite number
of its slice to 2^14: 22 bits of it, down to 2^-18 of the largest. Three products of such planes are float32's; the
product of the low planes is below its rounding. The higher plane alone has TF32's 11 bits.
Source: Ootomo and Yokota 2022 (arXiv:2203.03341), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ihvp.ops._rows import flat_rows, padded, ready
from ihvp.ops._triton._launch import block, count, launch, mask_bytes
from ihvp.ops._triton._tile import load_tokens, real_rows

TOP = tl.constexpr(14)  # the exponent that a slice's largest number gets


@dataclass(frozen=True)
class Planes:
    """(N,T,features) numbers: (high + low) scale[n]. Without `scale` and `low` they are the numbers of `high`."""

    high: Tensor
    low: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, part: slice) -> Planes:
        """Some of the slices."""
        return Planes(*(None if x is None else x[part] for x in (self.high, self.low, self.scale)))  # type: ignore[arg-type]

    def rows(self, part: slice) -> Planes:
        """Some of the rows of every slice."""
        return Planes(self.high[:, part], None if self.low is None else self.low[:, part], self.scale)

    def descriptors(self, rows: int, columns: int) -> tuple[Any, Any]:
        """Of both planes; a kernel that reads one gets that one twice."""
        high = TensorDescriptor(self.high, list(self.high.shape), list(self.high.stride()), [1, rows, columns])
        if self.low is None:
            return high, high
        return high, TensorDescriptor(self.low, list(self.low.shape), list(self.low.stride()), [1, rows, columns])


def flat(x: Planes) -> Planes:
    """(1,NT,features), of slices that all have one scale or that the scales are looked up for."""
    rows = [
        None
        if y is None
        else y.as_strided((1, len(y) * y.shape[1], y.shape[2]), (len(y) * y.shape[1] * y.stride(1), y.stride(1), 1))
        for y in (x.high, x.low)
    ]
    return Planes(rows[0], rows[1], x.scale)  # type: ignore[arg-type]


def empty_planes(N: int, T: int, features: int, low: bool, device: torch.device) -> Planes:
    high, second = (
        torch.empty(N, T, padded(features), dtype=torch.float16, device=device) if wanted else None
        for wanted in (True, low)
    )
    assert high is not None
    return Planes(high, second, torch.empty(N, device=device))


@triton.jit
def power_of_two(exponent):
    return (tl.minimum(tl.maximum(exponent, -126), 127) + 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(largest):
    """The e of the slice's scale 2^e, from its largest number (its bits order as the numbers do)."""
    return tl.where(largest > 0, (largest >> 23) - (126 + TOP), 0)


@triton.jit
def keep_largest(at, x):
    """at = max(at, |x|) of the finite numbers. A maximum comes out the same in any order."""
    size = tl.abs(x)
    size = tl.where(size < float("inf"), size, 0.0)
    tl.atomic_max(at, tl.max(tl.max(size, 1), 0).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def store_planes(high_ptr, low_ptr, at, x, inside):
    high = x.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + at, high, mask=inside)
    if low_ptr is not None:
        low = tl.where(tl.abs(x) < float("inf"), x - high.to(tl.float32), 0.0)
        tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=inside)


@triton.jit
def read_kernel(
    high_ptr,
    low_ptr,
    largest_ptr,
    scale_ptr,
    x_ptr,
    mask_ptr,
    T,
    features,
    width,
    stride_xn,
    stride_xt,
    stride_xi,
    stride_largest,
    BIAS: tl.constexpr,
    SQUARE: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """MEASURE: the largest number of each slice; else its planes and its scale."""
    row_blocks = tl.cdiv(T, BLOCK_T)
    n = (tl.program_id(0) // row_blocks).to(tl.int64)
    t = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    i = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    if mask_ptr is not None:
        mask_ptr += n * T
    real = real_rows(mask_ptr, t, T)
    x = load_tokens(x_ptr + n * stride_xn, t * stride_xt, real, i, features, stride_xi, BIAS, tl.float32)
    if SQUARE:
        x = x * x
    if MEASURE:
        keep_largest(largest_ptr + n * stride_largest, x)
    else:
        if largest_ptr is not None:
            exponent = exponent_of(tl.load(largest_ptr + n * stride_largest))
            x = x * power_of_two(-exponent)
            if tl.program_id(1) == 0:
                if tl.program_id(0) % row_blocks == 0:
                    tl.store(scale_ptr + n, power_of_two(exponent))
        at = (n * T + t)[:, None] * width + i[None, :]
        store_planes(high_ptr, low_ptr, at, x, (t < T)[:, None] & (i < width)[None, :])


def as_planes(x: Tensor) -> Planes:
    """A 16-bit tensor that is `ready`, as it is; of single rows and slices the strides have to fit all the same."""
    step = flat_rows(x)[1]
    return Planes(x.as_strided(x.shape, (x.shape[1] * step, step, 1)))


def planes(
    x: Tensor,
    mask: Tensor | None = None,
    bias: bool = False,
    *,
    narrow: bool = False,
    common: bool = False,
    square: bool = False,
    accurate: bool = False,
    largest: Tensor | None = None,
) -> Planes:
    """Of tokens or matrices (N,T,features): masked rows are zeros, with a bias column `features` is 1.

    `narrow` numbers are 16-bit and stay what they are: not even copied where rows can be fetched as they lie.
    Others get a scale for each n, or a `common` one; `square` takes their squares. `largest` (N,) has the bits of the
    largest absolute values, where a kernel before has measured them. There are two planes at torch's "highest" float32
    matmul precision, or where the numbers have to be `accurate`.
    """
    N, T, features = x.shape
    width = padded(features + bias)
    if narrow and mask is None and not bias and ready(x):
        return as_planes(x)
    two = accurate or torch.get_float32_matmul_precision() == "highest"
    rows, columns = block(T, 32), block(width, 128)
    grid = (N * count(T, rows), count(width, columns))
    low = torch.empty(N, T, width, dtype=torch.float16, device=x.device) if two and not narrow else None
    high = torch.empty(N, T, width, dtype=x.dtype if narrow else torch.float16, device=x.device)
    scale = None if narrow else torch.empty(N, device=x.device)
    step = 0 if common else 1
    constants = {"BIAS": bias, "SQUARE": square, "BLOCK_T": rows, "BLOCK_I": columns}
    measure = largest is None and not narrow
    if measure:
        largest = torch.zeros(1 if common else N, dtype=torch.int32, device=x.device)
    mask = mask_bytes(mask)
    for measuring in (True, False) if measure else (False,):
        launch(
            read_kernel,
            grid,
            high,
            low,
            largest,
            scale,
            x,
            mask,
            T,
            features,
            width,
            *x.stride(),
            step,
            constants={**constants, "MEASURE": measuring},
            warps=4,
        )
    return Planes(high, low, scale)
