"""The CUDA module without a GPU: it imports, says why nothing runs, refuses other memory, and its kernels fit."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ihvp
import pytest
import torch
from ihvp.__main__ import info
from ihvp.ops import _gpu

if not _gpu.installed("cuda"):
    pytest.skip("ihvp was built without nvcc: no CUDA kernels", allow_module_level=True)

from ihvp import _cuda
from ihvp.ops._cuda import _launch

without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
# Machine codes of each: of the sums for 9.0 alone, bfloat16 and float16 of squares and of a triangle; of the others for
# 8.0 and 9.0.
KERNELS = {"sums": 4, "add_parts": 4, "solve": 2}


def test_stub_is_fresh() -> None:
    stub = ast.parse(Path(ihvp.__file__).with_name("_cuda.pyi").read_text())
    written = {f.name: [a.arg for a in f.args.args] for f in stub.body if isinstance(f, ast.FunctionDef)}
    present = {
        name: re.findall(r"(\w+): ", function.__doc__.split(") ->")[0])
        for name, function in vars(_cuda).items()
        if callable(function)
    }
    assert written == present


@without_device
def test_without_a_device_it_imports_and_says_why() -> None:
    assert _cuda.device_count() == 0
    assert _cuda.why_no_device()
    with (
        pytest.raises(RuntimeError, match=r"need CUDA tensors, got cpu; CUDA says: \w+"),
        _launch.stream_of(torch.ones(1)),
    ):
        pass


def test_memory_elsewhere_is_refused() -> None:
    x = torch.zeros(1, 16, 16)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (_cuda.ekfac_diagonal_update, (x[0], x, x.half(), x.half(), 0)),
        (_cuda.covariance_update, (x[0], x, x.half(), 4096, 0)),
        (_cuda.ekfac_solve_grouped, (x.long(), x[0, 0], 1, 0)),
    ]
    for kernel, arguments in calls:
        with pytest.raises(ValueError, match="must be on a CUDA device"):
            kernel(*arguments)
        assert not x.any()


def test_it_was_built_for_the_devices_it_names() -> None:
    assert "80" in _cuda.architectures() and "90" in _cuda.architectures()
    assert re.fullmatch(r"[0-9a-f]{16}", _cuda.sources())
    assert "for sm_80, sm_90 and newer" in info()


def cuobjdump() -> str:
    """Triton's, or that of a CUDA toolkit."""
    found = importlib.util.find_spec("triton")
    bundled = [Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"] if found and found.origin else []
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "cuobjdump"
    tool = next((str(path) for path in [*bundled, toolkit] if path.exists()), shutil.which("cuobjdump"))
    assert tool, "cuobjdump comes with triton or with a CUDA toolkit"
    return tool


def test_kernels_keep_to_registers() -> None:
    shown = subprocess.run([cuobjdump(), "-res-usage", _cuda.__file__], capture_output=True, text=True, check=True)
    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", shown.stdout)
    for kernel, variants in KERNELS.items():
        own = [line for line in used if re.search(rf"\d+{kernel}(I|E)", line[0])]
        assert len(own) == variants, f"{kernel}: {[line[0] for line in own]}"
        assert all(int(registers) <= 255 for _, registers, _, _ in own)
    assert [line for line in used if int(line[2]) or int(line[3])] == []
