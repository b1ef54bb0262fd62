"""What kernels share on the device: reading rows of tokens, and one tile of one example's gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def real_rows(mask_ptr, rows, end):
    """Which of these rows exist and are not masked."""
    real = rows < end
    if mask_ptr is not None:
        real = real & (tl.load(mask_ptr + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def load_tokens(x_ptr, offsets, real, columns, features, stride, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """Rows at these offsets as (rows, columns); column `features` is the implicit 1."""
    inside = real[:, None] & (columns < features)[None, :]
    x = tl.load(x_ptr + offsets[:, None] + columns[None, :] * stride, mask=inside, other=0.0).to(DTYPE)
    if BIAS:
        x = tl.where(real[:, None] & (columns == features)[None, :], 1.0, x).to(DTYPE)
    return x


@triton.jit
def gradient_tile(
    a_ptr,
    d_ptr,
    mask_ptr,
    n,
    T,
    o,
    i,
    features_a,
    features_d,
    stride_an,
    stride_at,
    stride_ai,
    stride_dn,
    stride_dt,
    stride_do,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """g[n,o,i] = sum_t delta[n,t,o] a[n,t,i]."""
    a_ptr += n * stride_an
    d_ptr += n * stride_dn
    if mask_ptr is not None:
        mask_ptr += n * T
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        real = real_rows(mask_ptr, t, T)
        x = load_tokens(a_ptr, t * stride_at, real, i, features_a, stride_ai, BIAS, DTYPE)
        d = load_tokens(d_ptr, t * stride_dt, real, o, features_d, stride_do, False, DTYPE)
        acc = tl.dot(tl.trans(d), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def corner(tile, tiles, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """The row and column indices of the tile with this number, of `tiles` side by side."""
    i = (tile // tiles).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (tile % tiles).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    return i, j
