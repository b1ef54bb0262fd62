"""What kernels share on the device: reading rows of tokens, and where a tile stands."""

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
def corner(tile, tiles, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """The row and column indices of the tile with this number, of `tiles` side by side."""
    i = (tile // tiles).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (tile % tiles).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    return i, j
