"""What `test_triton.py` runs in processes of their own, one JSON line a case.

`python triton_child.py interpret`: every kernel under Triton's interpreter, against its float64 formula.
`python triton_child.py compile ARCHITECTURE`: every kernel compiled as it would be launched there, without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
else:
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import ihvp
import torch
import triton
from gpu_cases import CASES, GROUPS
from grouped_cases import GROUPED, group_formula, make_group
from ihvp import ops
from ihvp.ops._registry import DEVICES, implementations
from op_cases import BF16, F32, SPECS, Call, make
from tolerance import assert_close

DEVICES["triton"] = ("cpu", "cuda")  # what nothing but the interpreter and the compiler's stand-in can do

OPS = [op for op in SPECS if "triton" in implementations()[op]]


def interpreted() -> Iterator[dict[str, Any]]:
    for op in OPS:
        for case, (dims, how) in CASES.items():
            yield {"op": op, "case": case, "error": failure(run, make(op, dims, **how).fresh())}
    for op in GROUPED:
        for case, how in GROUPS.items():
            yield {"op": op, "case": case, "error": failure(run_group, op, how)}


def failure(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(call: Call) -> None:
    want = call.formula()
    with ihvp.use("triton"):
        result = call()
    call.check(result, want)


def run_group(op: str, how: dict[str, Any]) -> None:
    arguments = make_group(op, **{"Q": 2, **how})
    with ihvp.use("triton"):
        got = getattr(ops, op)(**arguments)
    for x, want in zip(got if isinstance(got, list) else [got], group_formula(op, arguments), strict=True):
        assert_close(x, want, x.dtype, 3 * 70 * 66)


ONE_POSITION = ("ekfac_diagonal_update_", "ekfac_self_influence", "weighted_ghost_dot")  # what T = 1 does otherwise

# The hardest for the registers, rows that no vector load fits and a bias; and the usual, on the widest tiles.
SHAPES: tuple[tuple[dict[str, int | None], dict[str, Any], str], ...] = (
    ({"I": 130, "O": 130}, {"bias": True, "masked": True}, "highest"),
    ({"I": 256, "O": 256}, {"dtype": BF16}, "medium"),
)


class StandIn:
    """What Triton asks of a driver when it compiles and launches nothing."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)


def compiled(architecture: int) -> Iterator[dict[str, Any]]:
    seen = []

    def compile_only(self: Any, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: seen.append((self, self.warmup(*arguments, grid=grid, **options)))

    triton.runtime.driver.set_active(StandIn(architecture))
    triton.JITFunction.__getitem__ = compile_only
    for dims, how, precision in SHAPES:
        torch.set_float32_matmul_precision(precision)
        for op in (*OPS, *GROUPED):
            for T in (128, 1) if op in ONE_POSITION else (128,):
                seen.clear()
                with ihvp.use("triton"):
                    if op in GROUPED:
                        dtype, bias = how.get("dtype", F32), how.get("bias", False)
                        getattr(ops, op)(**make_group(op, dtype, T=T, bias=bias, widths=((dims["I"], dims["O"]),)))
                    else:
                        make(op, {"N": 4, "M": 4, "S": T, "T": T, "R": 64, "Q": 20, **dims}, **how).fresh()()
                for kernel, result in seen:
                    yield {
                        "op": op,
                        "kernel": kernel.__name__,
                        "T": T,
                        "precision": precision,
                        **resources(result.asm["cubin"]),
                    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", shown)
    assert found, shown
    return {"registers": int(found[1]), "stack": int(found[2]) + int(found[3])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in interpreted() if sys.argv[1] == "interpret" else compiled(int(sys.argv[2])):
        print(json.dumps(line), flush=True)
