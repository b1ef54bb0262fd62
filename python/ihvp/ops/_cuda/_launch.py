"""What the callers of `_cuda` share: the stream, the arithmetic, and rows as asynchronous copies read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._arguments import read_tokens
from ihvp.ops._gpu import workspace


@contextlib.contextmanager
def stream_of(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, made current.

    Raises RuntimeError for tensors that are not on a CUDA device, naming what CUDA says when it has none.
    """
    if x.device.type != "cuda":
        reason = _cuda.why_no_device()
        raise RuntimeError(
            f"the CUDA kernels need CUDA tensors, got {x.device}" + (f"; CUDA says: {reason}" if reason else "")
        )
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


def terms() -> int:
    """TF32 products a float32 one is made of."""
    return 3 if torch.get_float32_matmul_precision() == "highest" else 1


def padded(features: int) -> int:
    """Rows of a multiple of 16 elements hold whole 16 bytes in any type."""
    return -(-features // 16) * 16


def parts(device: torch.device, tiles: int, depth: int) -> int:
    """Into how many parts a sum is cut to fill the device twice."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // max(tiles, 1), depth))


def rows_of(x: Tensor, mask: Tensor | None, bias: bool, dtype: torch.dtype) -> Tensor:
    """Tokens (N,T,width) in padded rows: as they are where that is what they are, copied otherwise."""
    fits = x.shape[2] % 16 == 0 and x.is_contiguous() and x.data_ptr() % 16 == 0
    if fits and mask is None and not bias and x.dtype == dtype:
        return x
    features = x.shape[2] + bias
    out = x.new_zeros(*x.shape[:2], padded(features), dtype=dtype)
    out[..., :features] = read_tokens(x, mask, bias, dtype)
    return out


def affordable(op: str, count: int, bytes_each: int, device: torch.device) -> int:
    """How many of `count` examples at once: `workspace` of torch's allocator, left to it for the tokens to come."""
    return workspace(op, count, bytes_each, lambda n: torch.empty(n * bytes_each, dtype=torch.uint8, device=device))[0]


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(layers, entries) int64 on the device, copied from pinned memory: the stream is not waited for."""
    return torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
