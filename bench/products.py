"""The products X @ Y that Python reaches on this machine, and how many threads each may take."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch
from ihvp import _native
from threadpoolctl import ThreadpoolController
from torch import Tensor

from bench.measure import processor

Product = Callable[[Tensor, Tensor], Tensor]


def onednn(X: Tensor, Y: Tensor) -> Tensor:
    """oneDNN's product inside torch, which torch.mm does not take in float32 on x86."""
    return torch.ops.mkldnn._linear_pointwise(X, Y.mT, None, "none", [], "")


def openblas(X: Tensor, Y: Tensor) -> Tensor:
    """numpy's product, on the memory of the tensors."""
    return torch.from_numpy(np.matmul(X.numpy(), Y.numpy()))


def products(dtype: torch.dtype) -> dict[str, Product]:
    """By name; those that have the type. oneDNN has no float64."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" not in blas:
        raise SystemExit(f"the bench takes OpenBLAS from numpy, but this numpy was built with {blas}")
    found: dict[str, Product] = {"torch.mm": torch.mm}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found["oneDNN"] = onednn
    found["OpenBLAS"] = openblas
    return found


SLOW = 0.6  # of the peak; MKL's slower path runs at 0.4
_pools = ThreadpoolController()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch, the kernels and OpenBLAS with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _pools.limit(limits=count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def torch_mm_share() -> float:
    """The share of the float32 peak that torch.mm reaches at 1024^3 with one thread, medians in turns."""
    rounds = int(2e9 / _native.peak("float32", 1, 1))
    flops = {"product": 2 * 1024**3, "peak": _native.peak("float32", rounds, 1)}
    times: dict[str, list[float]] = {name: [] for name in flops}
    with threads(1):
        x = torch.randn(1024, 1024)
        for name in [*flops] * 9:
            start = time.perf_counter()
            _native.peak("float32", rounds, 1) if name == "peak" else torch.mm(x, x)
            times[name].append(time.perf_counter() - start)
    product, peak = (flops[name] / median(own) for name, own in times.items())
    return product / peak


def torch_mm_counts() -> bool:
    """Ratios to torch.mm are for AMD processors where MKL takes a slower path, which not all its versions do."""
    return processor()[0] == "AuthenticAMD" and torch.backends.mkl.is_available() and torch_mm_share() < SLOW


def processor_case() -> str:
    """Whether ratios to torch.mm count here."""
    vendor = processor()[0]
    if not torch.backends.mkl.is_available():
        return f"{vendor}, torch without MKL: ratios to torch.mm are printed, but do not count"
    what = f"{vendor}, where torch.mm (MKL) runs at {torch_mm_share():.0%} of the peak"
    if torch_mm_counts():
        return f"{what}, its slower path: ratios to it count"
    return f"{what}: shares of the peak and ratios to the best library product count, ratios to it do not"
