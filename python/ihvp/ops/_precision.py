"""torch's float32 matmul precision, and what the native kernels make of it.

Beside `torch.set_float32_matmul_precision` newer versions have a setting for each backend,
`torch.backends.mkldnn.matmul.fp32_precision` for the CPU. Where these differ, torch refuses to tell the common one.
"""

from __future__ import annotations

import torch

from ihvp import _native

FIXED_POINT = ("avx512vnni", "avx512bf16", "amx")  # instruction sets with products of 16-bit integers


def cpu_precision() -> str:
    """ "highest", "high" or "medium": the CPU's own setting where there is one."""
    own = getattr(torch.backends.mkldnn, "matmul", None)
    if own is None:
        return torch.get_float32_matmul_precision()
    return {"tf32": "high", "bf16": "medium"}.get(own.fp32_precision, "highest")


def common_precision() -> str | None:
    """The same for all backends; None where torch does not tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def float32_products() -> str:
    """ "float32"; below torch's "highest" precision "int16", where the processor gains by it."""
    return "float32" if cpu_precision() == "highest" or _native.isa() not in FIXED_POINT else "int16"
