"""The ops' implementations for GPUs: imported when first called, and chosen by what has been shown of them.

`proven.json` records, by device class and op, which kernels passed all their tests on such a device, and their measured
speed over the reference by the size and the type of the operands:
{"sm_90": {"ghost_norm": {"triton": {"speedup": {"large float32": 3.1}, "sources": "0f3a..."}}}}.
A record holds only for the very sources that were tested: a changed kernel has to pass again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

LARGE, HUGE = 1 << 19, 1 << 24  # numbers among the operands
WORKSPACE = 1 << 28  # bytes that a call takes at most, unless a single example needs more
T = TypeVar("T")

RECORD = Path(__file__).with_name("proven.json")
LEAST_TRITON = (3, 4)  # the first with tensor descriptors
MISSING = {
    "triton": "triton is not installed, or older than 3.4; torch's CUDA builds bring it, or: pip install triton",
    "cuda": "this build of ihvp has no CUDA kernels: no nvcc of 12.5 or newer was found when it was built",
}


def triton(op: str) -> Callable[..., Any]:
    """The op's Triton kernel, `run` of `ihvp.ops._triton.<op>`."""
    return Lazy("triton", f"ihvp.ops._triton.{op}")


def cuda(op: str, lacks: Callable[..., str] | None = None) -> Callable[..., Any]:
    """The op's CUDA kernel, `run` of `ihvp.ops._cuda.<op>`; `lacks` says of its arguments what it does not take."""
    return Lazy("cuda", f"ihvp.ops._cuda.{op}", lacks)


class Lazy:
    """An implementation that is imported when it is first called."""

    def __init__(self, implementation: str, module: str, lacks: Callable[..., str] | None = None) -> None:
        self.implementation, self.module, self.lacks = implementation, module, lacks

    def __call__(self, *args: Any) -> Any:
        if not installed(self.implementation):
            raise RuntimeError(MISSING[self.implementation])
        return importlib.import_module(self.module).run(*args)


@functools.cache
def installed(implementation: str) -> bool:
    """Whether the package or extension that the implementation needs is there, and new enough."""
    if implementation == "cuda":
        return importlib.util.find_spec("ihvp._cuda") is not None
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # under another name, as torch's nightly builds bring it
        version = str(importlib.import_module("triton").__version__)
    return tuple(map(int, version.split(".")[:2])) >= LEAST_TRITON


@functools.cache
def sources(implementation: str) -> str:
    """A digest of all sources of the implementation: the files, or what the extension was built from."""
    if implementation == "cuda":
        return str(importlib.import_module("ihvp._cuda").sources()) if installed("cuda") else ""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).with_name("_triton").glob("*.py")):
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def device_class(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def record() -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(RECORD.read_text())
    return found


def speedups(op: str, kind: str, widest: torch.dtype, size: str) -> dict[str, float]:
    """Measured speed over the reference, of the implementations of an op proven on this device class.

    That of float32 operands, or of 16-bit ones, which are measured in bfloat16; of a size as `size_of` tells it.
    """
    measured = f"{size} {'float32' if widest == torch.float32 else 'bfloat16'}"
    return {
        name: float(entry["speedup"][measured])
        for name, entry in record().get(kind, {}).get(op, {}).items()
        if installed(name) and entry["sources"] == sources(name) and measured in entry["speedup"]
    }


def size_of(args: Sequence[Any]) -> str:
    """The class of size that speeds are measured by: "small", where launches take longest, "large", or "huge".

    It goes by the numbers among the operands; a group of layers is "large".
    """
    total = 0
    for x in args:
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
            return "large"
        if isinstance(x, torch.Tensor):
            total += x.numel()
    return "huge" if total >= HUGE else "large" if total >= LARGE else "small"


def workspace(op: str, count: int, bytes_each: int, make: Callable[[int], T]) -> tuple[int, T]:
    """`make(chunk)` for as many of `count` items at once as WORKSPACE holds; half as many when memory runs out.

    Raises torch.OutOfMemoryError with what was needed when that fails too.
    """
    chunk = max(1, min(count, WORKSPACE // max(bytes_each, 1)))
    try:
        return chunk, make(chunk)
    except torch.OutOfMemoryError:
        chunk = max(1, chunk // 2)
    try:
        return chunk, make(chunk)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{op} needs {chunk * bytes_each / 2**20:.1f} MiB of workspace for {chunk} of {count} at a time"
        ) from error


@functools.cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def parts_of(device: torch.device, tiles: int, items: int) -> int:
    """Into how many parts the sum over `items` is cut: the least turns of one program a processor, then few parts."""
    return _parts_of(processors(device), tiles, items)


@functools.lru_cache(4096)
def _parts_of(processors: int, tiles: int, items: int) -> int:
    options = range(1, min(items, 32) + 1)
    return min(options, key=lambda parts: -(-tiles * parts // processors) * -(-items // parts) * (1 + 0.01 * parts))
