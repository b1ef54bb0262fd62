"""What the native kernels make float32 products of."""

from __future__ import annotations

import torch

from ihvp import _native

FIXED_POINT = ("avx512vnni", "avx512bf16", "amx")  # instruction sets with products of 16-bit integers


def float32_products() -> str:
    """ "float32"; below torch's "highest" float32 matmul precision "int16", where the processor gains by it."""
    exact = torch.get_float32_matmul_precision() == "highest" or _native.isa() not in FIXED_POINT
    return "float32" if exact else "int16"
