"""The products X @ Y that Python reaches on this machine, and how many threads each may take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
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


def is_amd() -> bool:
    return processor()[0] == "AuthenticAMD"


def processor_case() -> str:
    """Whether ratios to torch.mm count here."""
    vendor = processor()[0]
    if not torch.backends.mkl.is_available():
        return f"{vendor}, torch without MKL: ratios to torch.mm are printed, but do not count"
    if is_amd():
        return "AMD, where torch.mm (MKL) takes its slower path: ratios to torch.mm count"
    return f"{vendor}, where torch.mm (MKL) is fast: shares of the peak and ratios to the best library product count"
