"""`python -m ihvp info` says what is installed; `python -m ihvp demo` shows the main job on real data."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import ihvp
from ihvp import _native
from ihvp.ops import _gpu
from ihvp.ops._registry import GPU, IMPLEMENTATIONS, implementations

DEMO_PACKAGES = ("sklearn", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the subcommand that the arguments name; without arguments those of the command line."""
    wanted = _parser().parse_args(arguments)
    if wanted.command == "info":
        print(info())
    else:
        _demo(wanted.quick, wanted.output, wanted.seed)


def info() -> str:
    """Versions, instruction sets, threads, devices, and the implementations of each op."""
    facts = {
        "ihvp": ihvp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "instruction sets": ", ".join(_instruction_sets()),
        "OpenMP": "yes" if _native.has_openmp() else "no",
        "threads": str(torch.get_num_threads()),
        "triton": importlib.metadata.version("triton") if _gpu.installed("triton") else "not installed",
        "CUDA kernels": _cuda_kernels(),
        "CUDA devices": ", ".join(_cuda_devices()) or "none",
        "proven on": ", ".join(sorted(_gpu.record())) or "no GPU yet: unproven kernels run by ihvp.use alone",
    }
    present = implementations()
    rows = [
        [op, *(_state(op, name) if name in own else "-" for name in IMPLEMENTATIONS)] for op, own in present.items()
    ]
    return "\n".join(
        [*_aligned([list(fact) for fact in facts.items()]), "", *_aligned([["op", *IMPLEMENTATIONS], *rows])]
    )


def _instruction_sets() -> list[str]:
    """Those compiled, the widest first."""
    chosen = _native.isa()
    notes = {True: "", False: " (compiled, not of this processor)"}
    return [name + (" (chosen)" if name == chosen else notes[runs]) for name, runs in _native.isas().items()]


def _state(op: str, implementation: str) -> str:
    """Of a kernel for GPUs, the device classes where it passed its tests, and its speed over the reference there."""
    if implementation not in GPU:
        return "yes"
    found = []
    for kind in sorted(_gpu.record()):
        for dtype in (torch.float32, torch.bfloat16):
            speeds = [_gpu.speedups(op, kind, dtype, size).get(implementation) for size in ("small", "large", "huge")]
            if any(speeds):
                each = "/".join("-" if speed is None else f"{speed:.1f}" for speed in speeds)
                found.append(f"{kind} {str(dtype).removeprefix('torch.')} {each}")
    return ", ".join(found) or "unproven"


def _cuda_kernels() -> str:
    if not _gpu.installed("cuda"):
        return "not built"
    from ihvp import _cuda

    # CMake's words: "80-real" is machine code, "90" that and PTX, which newer devices compile.
    names = [
        f"sm_{name.removesuffix('-real')}" + ("" if name.endswith("-real") else " and newer")
        for name in _cuda.architectures().split(", ")
    ]
    return f"for {', '.join(names)}"


def _cuda_devices() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _demo(quick: bool, output: Path, seed: int) -> None:
    try:
        from ihvp.demo import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_PACKAGES:
            raise
        sys.exit(f"the demo needs scikit-learn and matplotlib, and {error.name} is missing: pip install 'ihvp[demo]'")
    try:
        run(quick, output, seed)
    except OSError as error:
        sys.exit(f"cannot write to {output}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ihvp", description="Influence functions and data attribution.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction sets, threads, devices, implementations of each op")
    demo = commands.add_parser("demo", help="find wrong labels and explain predictions on scikit-learn's digits")
    demo.add_argument("--quick", action="store_true", help="fewer examples and epochs, for checks")
    demo.add_argument("--output", type=Path, default=Path("ihvp_demo"), metavar="FOLDER", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    main()
