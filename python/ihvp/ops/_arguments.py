"""Checks of an op's arguments, and what all references share: tokens as (N,T,features) with mask and bias applied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def shape_of(x: Tensor) -> str:
    return str(tuple(x.shape))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any operand is, float32 otherwise: sums are never narrower than float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def plain(tensors: Iterable[object]) -> bool:
    """A quick look: nothing in `check_tensors` could object. When not, each tensor is looked at and named."""
    if forward_ad._current_level >= 0:
        return False
    device: torch.device | None = None
    for x in tensors:
        if (
            not isinstance(x, Tensor)
            or x.dtype not in FLOATING
            or x.layout != torch.strided
            or x.requires_grad
            or x.is_nested
        ):
            return False
        if device is None:
            if not (x.is_cpu or x.is_cuda):
                return False
            device = x.device
        elif x.device != device:
            return False
    return True


def check_tensors(optional: Mapping[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """Every argument is a dense floating point tensor with data, all on one device, outside autograd.

    Those in `optional` may be None.
    """
    if optional is not None:
        tensors |= {name: x for name, x in optional.items() if x is not None}
    if plain(tensors.values()):
        return
    device: torch.device | None = None
    first = ""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else f'layout {x.layout}'}"
            )
        if x.device.type == "meta":
            raise ValueError(f"{name} must hold data, got a meta tensor, which has a shape alone")
        if x.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name} must be on a CPU or CUDA device, got {x.device}")
        if x.dtype not in FLOATING:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name} requires grad, but ihvp's ops are not differentiable; pass {name}.detach()")
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{name} carries a tangent, but ihvp's ops are not differentiable; pass its primal")
        if device is None:
            device, first = x.device, name
        elif x.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {x.device}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_accumulator(name: str, x: Tensor, *operands: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if x.dtype != torch.float64 and compute_dtype(*operands) == torch.float64:
        raise TypeError(f"{name} must be float64 for float64 operands, got {x.dtype}")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name} must own its memory, got a negated view; pass {name}.resolve_neg()")
    if x.is_contiguous():
        return
    reach = 1  # every index needs an address of its own
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and x.numel() > 0:
            if stride < reach:
                raise ValueError(f"{name} overlaps itself in memory: strides {x.stride()} of shape {shape_of(x)}")
            reach += stride * (size - 1)


def check_shape(name: str, x: Tensor | None, letters: str, shape: tuple[int, ...]) -> None:
    """`letters` is how the documentation writes the shape, for the error message."""
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {shape_of(x)}")


def check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True at real positions, got {mask.dtype}")
    if mask.layout != torch.strided or mask.device != x.device:
        raise ValueError(f"{name} must be a dense tensor on {x.device}, got {mask.layout} on {mask.device}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"{name} must be (N,T) = {tuple(x.shape[:-1])}, got {shape_of(mask)}")


def as_tokens(name: str, x: Tensor) -> Tensor:
    """(N,T,features); two dimensions mean T = 1."""
    if x.dim() == 2:
        return x.unsqueeze(1)
    if x.dim() != 3:
        raise ValueError(f"{name} must be (N,T,features) or (N,features), got {shape_of(x)}")
    return x


def as_token_mask(mask: Tensor | None) -> Tensor | None:
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 1 else mask


def check_pair(
    a: Tensor, delta: Tensor, mask: Tensor | None, *, suffix: str = ""
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`a` (N,T,I), `delta` (N,T,O) and `mask` (N,T) of the same positions, as three-dimensional views."""
    tokens_a = as_tokens("a" + suffix, a)
    if delta.shape[:-1] != a.shape[:-1]:
        N, T, _ = tokens_a.shape
        raise ValueError(
            f"delta{suffix} must be (N,T,O) with N={N}, T={T} as in a{suffix} {shape_of(a)}, got {shape_of(delta)}"
        )
    check_mask("mask" + suffix, mask, a)
    return tokens_a, delta if tokens_a is a else delta.unsqueeze(1), as_token_mask(mask)


def features(a: Tensor, bias: bool) -> int:
    """I': the inputs and the implicit bias feature."""
    return int(a.shape[-1]) + bias


def read_tokens(x: Tensor, mask: Tensor | None, bias: bool, dtype: torch.dtype) -> Tensor:
    """Tokens in `dtype` with the bias feature appended; masked positions are zero whatever they held."""
    x = x.to(dtype)
    if bias:
        x = torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)
    if mask is not None:
        x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
    return x
