"""What all benchmarks share: timing, memory, the machine's stamp, checks, results as JSON lines."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ihvp
import torch
from ihvp import _native
from torch import Tensor

LEAST_SAMPLE = 5e-3  # seconds: shorter calls are repeated within a sample


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of the samples, and the spread between the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float
    samples: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def __str__(self) -> str:
        return f"{self.median * 1e3:9.2f} ms ({self.fastest * 1e3:.2f} to {self.slowest * 1e3:.2f})"


@dataclass(frozen=True)
class Effort:
    """How long to measure: samples of each call, and the seconds after which a slow call gets no further ones."""

    samples: int
    budget: float


FULL, QUICK = Effort(15, 2.0), Effort(5, 0.2)


def once(f: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = f()
    return result, time.perf_counter() - start


def race(runs: Mapping[str, Callable[[], Any]], first: Mapping[str, float], effort: Effort) -> dict[str, Timing]:
    """Time calls in turns, so that the machine's noise hits all alike.

    `first` has the seconds of a call before: how often a sample repeats a short one, and the only sample of one that
    took the budget alone. Before each sample a short call runs once unmeasured: caches and threads are then its own.
    """
    seconds = {name: [first[name]] if first[name] > effort.budget else [] for name in runs}
    for _ in range(effort.samples):
        for name, run in runs.items():
            if sum(seconds[name]) > effort.budget:
                continue
            calls = max(1, math.ceil(LEAST_SAMPLE / max(first[name], 1e-7)))
            if first[name] < 10 * LEAST_SAMPLE:
                run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing.of(values) for name, values in seconds.items()}


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_memory() -> int:
    """The most resident memory this process had, in bytes, since it began or `forget_peak_memory`."""
    return status_bytes("VmHWM")


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def processor() -> tuple[str, str]:
    """(vendor, model) as the processor calls itself."""
    found = {"vendor_id": platform.machine(), "model name": platform.processor()}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in found:
            found[key.strip()] = value.strip()
        elif not line:
            break  # the other processors are alike
    return found["vendor_id"], found["model name"]


def machine() -> dict[str, Any]:
    return {
        "processor": processor()[1],
        "threads": torch.get_num_threads(),
        "isa": _native.isa(),
        "torch": torch.__version__,
        "ihvp": ihvp.__version__,
        "python": platform.python_version(),
    }


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|| x - reference || / || reference ||, in float64."""
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def check(what: str, error: float, limit: float) -> None:
    print(f"check  {what:<78} relative error {error:.1e}  (limit {limit:.0e})", flush=True)
    require(what, error, limit)


def require(what: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise SystemExit(f"wrong answer: {what}: relative error {error:.2e} is over {limit:.0e}; it was not timed")


def write(path: Path | None, records: list[dict[str, Any]]) -> None:
    """Append JSON lines, each with the machine's stamp."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = machine()
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(record | {"machine": stamp}, default=asdict) + "\n")
