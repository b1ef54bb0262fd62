"""Rows of tokens as kernels for GPUs fetch them: how they lie in memory, and in which type."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def alike(*operands: Tensor) -> bool:
    """Whether all are of one 16-bit type, whose products are exact in float32."""
    return operands[0].dtype in NARROW and all(x.dtype == operands[0].dtype for x in operands)


def padded(features: int) -> int:
    """Rows of a multiple of 16 numbers begin at whole 32 bytes."""
    return -(-features // 16) * 16


def flat_rows(x: Tensor) -> tuple[int, int, int]:
    """(T, stride_n, stride_t) of the rows of (N,T,features); T = 1 where one stride leads through all of them."""
    N, T, _ = x.shape
    if T == 1:
        return 1, x.stride(0), 0
    if N <= 1 or x.stride(0) == T * x.stride(1):
        return 1, x.stride(1), 0
    return T, x.stride(0), x.stride(1)


def ready(x: Tensor) -> bool:
    """Whether a tensor map reaches it: features side by side, rows evenly apart by a multiple of 16 bytes."""
    T, step, _ = flat_rows(x)
    near = x.stride(2) == 1 and T == 1
    return near and step >= x.shape[2] and step * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
