"""The CUDA kernels' own sources, compiled for the host with each thread a fiber: what they compute without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import BF16, F16, F32, F64
from tolerance import assert_close
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc" / "cuda"
TYPES = {F32: 0, BF16: 1, F16: 2}
FILES = ("covariance_update", "ekfac_diagonal_update", "ekfac_solve_grouped", "gradient_dot_grouped")

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


def kind(dtype: torch.dtype) -> ctypes.c_int:
    return ctypes.c_int(TYPES[dtype])


def padded(*shape: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random rows, zeros from their end to `width`."""
    x = torch.zeros(*shape[:-1], width, dtype=dtype)
    x[..., : shape[-1]] = torch.randn(shape, generator=generator).to(dtype)
    return x


@pytest.mark.parametrize(("T", "dtype", "terms"), [(19, F32, 3), (37, BF16, 1), (1, F32, 3)])
def test_ekfac_diagonal_update(
    library: Any, generator: torch.Generator, T: int, dtype: torch.dtype, terms: int
) -> None:
    N, O, I, parts = 3, 130, 20, 2
    d = padded(N, T, O, width=144, dtype=dtype, generator=generator)
    x = padded(N, T, I, width=32, dtype=dtype, generator=generator)
    out = torch.full((parts, O, I), torch.nan)
    squared = ctypes.c_bool(T == 1)
    call(
        library.ekfac_diagonal_update, out, d, x, kind(dtype), N, T, O, 144, I, 32, parts, ctypes.c_int(terms), squared
    )
    g = torch.einsum("nto,nti->noi", d[..., :O].double(), x[..., :I].double())
    assert_close(out.sum(0), g.square().sum(0), F32, N * T)


@pytest.mark.parametrize(("dtype", "terms"), [(F32, 3), (BF16, 1)])
def test_covariance_update(library: Any, generator: torch.Generator, dtype: torch.dtype, terms: int) -> None:
    rows, d, parts, chunk = 77, 130, 2, 32
    x = padded(rows, d, width=144, dtype=dtype, generator=generator)
    out = torch.zeros(parts, d, d, dtype=F64)
    call(library.covariance_update, out, x, kind(dtype), rows, d, 144, parts, chunk, ctypes.c_int(terms))
    want = x[:, :d].double().T @ x[:, :d].double()
    assert_close(out.sum(0).triu(), want.triu(), F32, rows)


@pytest.mark.parametrize(("dtype", "bias"), [(F32, True), (BF16, False), (F16, True)])
def test_gradient_dot_grouped(library: Any, generator: torch.Generator, dtype: torch.dtype, bias: bool) -> None:
    Q, N, T, widths = 3, 2, 17, ((5, 140), (9, 3))
    mask = torch.rand(N, T, generator=generator) > 0.3
    P = [torch.randn(Q, O, I + bias, generator=generator) for O, I in widths]
    a = [torch.randn(N, T, I, 2, generator=generator).to(dtype)[..., 0] for _, I in widths]  # strided
    delta = [torch.randn(N, O, T, generator=generator).to(dtype).mT for O, _ in widths]  # transposed
    table = torch.tensor(
        [
            (x.data_ptr(), y.data_ptr(), z.data_ptr(), *x.shape[1:], *x.stride(), *y.stride(), *z.stride())
            for x, y, z in zip(P, a, delta, strict=True)
        ]
    )
    out = torch.full((2, Q, N), torch.nan)
    terms = ctypes.c_int(3 if dtype == F32 else 1)
    call(library.gradient_dot_grouped, out, table, mask, kind(dtype), 2, Q, N, T, ctypes.c_bool(bias), terms)
    for own, p, x, d in zip(out, P, a, delta, strict=True):
        x = torch.cat([x, x.new_ones(N, T, int(bias))], 2).double() * mask[..., None]
        assert_close(own, torch.einsum("qoi,nto,nti->qn", p.double(), d.double(), x), F32, T * 9 * 141)


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
