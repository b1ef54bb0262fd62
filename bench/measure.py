"""What all benchmarks share: timing, memory, the machine's stamp, results as JSON lines."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ihvp
import torch
from ihvp import _native


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the repeats, and the spread between the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:9.2f} ms ({self.fastest * 1e3:.2f} to {self.slowest * 1e3:.2f})"


def timed(f: Callable[[], Any], repeats: int = 7) -> Timing:
    f()  # warm up
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def once(f: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start


def peak_memory() -> int:
    """The most resident memory this process ever had, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def machine() -> dict[str, Any]:
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {
        "processor": name,
        "threads": torch.get_num_threads(),
        "isa": _native.isa(),
        "torch": torch.__version__,
        "ihvp": ihvp.__version__,
        "python": platform.python_version(),
    }


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """|| x - reference || / || reference ||, in float64."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def check(what: str, error: float, limit: float) -> None:
    print(f"check  {what:<60} relative error {error:.1e}  (limit {limit:.0e})")
    if not error <= limit:
        raise SystemExit(f"wrong answer: {what}: relative error {error:.2e} is over {limit:.0e}; nothing was timed")


def write(path: Path | None, records: list[dict[str, Any]]) -> None:
    """Append JSON lines, each with the machine's stamp."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = machine()
    with path.open("a") as file:
        for record in records:
            plain = {key: asdict(value) if isinstance(value, Timing) else value for key, value in record.items()}
            file.write(json.dumps(plain | {"machine": stamp}) + "\n")
