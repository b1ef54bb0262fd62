"""The host's side of every kernel: launching it, the arithmetic of its products, its tiles and its workspace."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    raise ImportError(f"the Triton kernels need triton 3.4 or newer, got {triton.__version__}")


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)
LEAST_CAPABILITY = (8, 0)
REGISTERS = 255  # a thread may have; left alone, ptxas spills a few of them to fit one more block
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, constants: Mapping[str, Any], warps: int, stages: int = 3
) -> None:
    """Run a kernel on the device and the current stream of its first argument; nothing waits for it.

    Triton looks through all arguments at each launch, which takes longer than a small kernel: what it compiled is kept
    here by what it makes a difference for.

    Raises RuntimeError for a device older than the kernels' instructions, ValueError for more programs than one launch
    can have.
    """
    if 0 in grid:
        return
    if grid[0] >= 2**31 or any(size >= 2**16 for size in grid[1:]):
        raise ValueError(f"this call is too large for one launch: {grid} programs; pass fewer examples at a time")
    device = arguments[0].device
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": REGISTERS}
    if device.type != "cuda":  # the interpreter
        kernel[grid](*arguments, **constants, **options)
        return
    if capability(device.index) < LEAST_CAPABILITY:
        raise RuntimeError(
            "the Triton kernels need compute capability 8.0 or newer, "
            f"{device} has {'.'.join(map(str, capability(device.index)))}"
        )
    values = [constants[name] for name in kernel.arg_names[len(arguments) :]]
    key = (id(kernel), device.index, warps, stages, *values, *map(_kind, arguments))
    compiled = _compiled.get(key)
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else contextlib.nullcontext():
        if compiled is None:
            _compiled[key] = kernel[grid](*arguments, **constants, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)


def _kind(x: Any) -> Any:
    """What Triton compiles other code for: types, multiples of 16 and the number 1."""
    if type(x) is int:
        return (x == 1) + 2 * (x % 16 == 0) + 4 * (x >= 2**31)
    if x is None:
        return None
    return (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else (x.base.dtype, *x.block_shape)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether the device's tensor cores read their operands from shared memory."""
    if device.type == "cuda":
        return capability(device.index) >= (9, 0)
    return not INTERPRETED and triton.runtime.driver.active.get_current_target().arch >= 90  # compiled, not run


@dataclass(frozen=True)
class Arithmetic:
    """In which type the operands of a product meet, and how float32 ones are multiplied."""

    dtype: torch.dtype
    precision: str

    @property
    def constants(self) -> dict[str, Any]:
        # The interpreter's numpy has no bfloat16.
        return {"DTYPE": tl.float32 if INTERPRETED else TYPES[self.dtype], "PRECISION": self.precision}


ACCURATE = Arithmetic(torch.float32, "tf32x3")


def arithmetic(*operands: Tensor) -> Arithmetic:
    """Of operands as they are stored: 16-bit ones of one type as they are, all others in float32."""
    dtype = operands[0].dtype
    if dtype != torch.float32 and all(x.dtype == dtype for x in operands):
        return Arithmetic(dtype, "ieee")
    return wide_arithmetic()


def wide_arithmetic() -> Arithmetic:
    """Of operands that meet in float32 whatever they are stored in."""
    return Arithmetic(torch.float32, "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def depth(how: Arithmetic) -> int:
    """Terms of a sum a step: 64 bytes of TF32 operands, which go through registers three times, or 128 of others."""
    return {"tf32x3": 16, "tf32": 32, "ieee": 64}[how.precision]


def warps(rows: int, columns: int) -> int:
    return 8 if rows * columns >= 4096 else 4


def next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 0 else 0


def block(size: int, limit: int) -> int:
    """The tile's edge for an extent: a power of two from 16, the tensor cores' least, to `limit`."""
    return max(16, min(limit, next_power_of_2(size)))


def tile_of_planes(device: torch.device, rows: int, columns: int, terms: int) -> tuple[int, int, int]:
    """(rows, columns, terms a step) of a tile of a product of planes.

    Hopper's tensor cores read operands from shared memory; before it they go through registers, and tiles are smaller.
    """
    edge, step = (128, 64) if hopper(device) else (64, 32)
    return block(rows, edge), block(columns, edge), block(terms, step)


def count(size: int, block: int) -> int:
    return -(-size // block)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """(N,T) bytes side by side, as kernels read a mask."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
