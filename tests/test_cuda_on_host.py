"""A CUDA kernel's own source, compiled for the host with each thread a fiber: what it computes without a GPU.

Those of Hopper's own instructions (csrc/cuda/sums.cu) run on such a device alone.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import F32
from tolerance import assert_close
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc" / "cuda"
FILES = ("ekfac_solve_grouped",)

compiler = shutil.which("g++")
pytestmark = pytest.mark.skipif(compiler is None or not SOURCES.exists(), reason="needs g++ and the sources")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    built = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    sources = [flag for name in FILES for flag in ("-x", "c++", str(SOURCES / f"{name}.cu"))]
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-DIHVP_ON_HOST"]
    folders = [f"-I{SOURCES}", f"-I{HERE / 'cuda_on_host'}"]
    names = [*sources, str(HERE / "cuda_on_host" / "library.cpp")]
    subprocess.run([compiler, *flags, *folders, *names, "-o", str(built)], check=True)
    loaded = ctypes.CDLL(str(built))
    for name in FILES:
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def call(function: Any, *arguments: Any) -> None:
    """Tensors by their address, integers in 64 bits; flags and types are narrower and say so themselves."""
    plain = [
        ctypes.c_void_p(x.data_ptr())
        if isinstance(x, Tensor)
        else ctypes.c_int64(x)
        if isinstance(x, int) and not isinstance(x, bool)
        else x
        for x in arguments
    ]
    assert function(*plain) is None


def test_ekfac_solve_grouped(library: Any, generator: torch.Generator) -> None:
    Q, widths, damping = 1, ((5, 70), (128, 20)), torch.tensor([0.1, 0.3])
    V = [torch.randn(Q, O, I, generator=generator) for O, I in widths]
    U_A = [torch.linalg.qr(torch.randn(I, I, generator=generator)).Q.contiguous() for _, I in widths]
    U_G = [torch.linalg.qr(torch.randn(O, O, generator=generator)).Q.mT.contiguous().mT for O, _ in widths]
    Lambda = [torch.randn(O, I, generator=generator).abs() for O, I in widths]
    out = [torch.full_like(x, torch.nan) for x in V]
    rows = [
        (*(x.data_ptr() for x in own), *own[0].shape[1:], *(stride for x in own[:4] for stride in x.stride()))
        for own in zip(V, U_A, U_G, Lambda, out, strict=True)
    ]
    call(library.ekfac_solve_grouped, torch.tensor(rows), damping, 2, Q)
    for own, v, A, G, values, shift in zip(out, V, U_A, U_G, Lambda, damping, strict=True):
        A, G = A.double(), G.double()
        assert_close(own, G @ ((G.T @ v.double() @ A) / (values.double() + shift.double())) @ A.T, F32, v[0].numel())
