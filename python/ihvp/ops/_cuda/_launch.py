"""What the callers of `_cuda` share: the stream, and rows and tables as its kernels read them."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ihvp import _cuda
from ihvp.ops._arguments import read_tokens
from ihvp.ops._rows import padded, ready


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


def rows_of(x: Tensor, mask: Tensor | None, bias: bool) -> Tensor:
    """16-bit tokens (N,T,width) that a tensor map reaches: as they lie where it does, else copied into padded rows."""
    if mask is None and not bias and ready(x):
        return x
    features = x.shape[2] + bias
    out = x.new_zeros(*x.shape[:2], padded(features))
    out[..., :features] = read_tokens(x, mask, bias, x.dtype)
    return out


def table(rows: Sequence[int], entries: int, device: torch.device) -> Tensor:
    """(layers, entries) int64 on the device, copied from pinned memory: the stream is not waited for."""
    host = torch.frombuffer(array("q", rows), dtype=torch.int64).view(-1, entries)
    return host.pin_memory().to(device, non_blocking=True)
