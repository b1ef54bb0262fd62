"""The GPU kernels against tuned torch, answers checked first: single calls, and what the device alone takes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import ihvp
import torch
from ihvp import ops
from ihvp.ops import _gpu
from ihvp.ops._registry import GPU, implementations
from torch import Tensor

from bench.gpu_cases import CASES, PEAKS, Case, expected
from bench.gpu_every_op import EVERY_OP, Plain
from bench.measure import check, relative_error, write

LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of single runs between two events, after warming up: the host's part is in it where it is longer."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def device_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of replays of a CUDA graph of the call: what the device alone takes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, repeats)


def widened(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: widened(x) for name, x in value.items()}
    if isinstance(value, list):
        return [widened(x) for x in value]
    return value.double() if isinstance(value, Tensor) else value


def joined(result: Any) -> Tensor:
    if isinstance(result, (list, tuple)):
        return torch.cat([x.flatten() for x in result])
    return result


def compared(
    name: str, op: str, arguments: dict[str, Any], rival: Callable[..., Any] | None, limit: float
) -> dict[str, Callable[[], Any]]:
    """The rival and the implementations present, each one's answer checked against float64."""
    run = getattr(ops, op)
    target = next(iter(arguments.values())) if op.endswith("_") else None
    with ihvp.use("reference"):
        wide = widened(arguments)
        want = joined(run(**wide)).clone()
    del wide
    runs: dict[str, Callable[[], Any]] = {} if rival is None else {"torch": lambda: rival(**arguments)}
    for implementation in ("reference", *GPU):
        present = implementation in implementations()[op] and (
            implementation not in GPU or _gpu.installed(implementation)
        )
        if present and takes(implementation, run, arguments):
            runs[implementation] = forced(implementation, run, arguments)
    for own, call in runs.items():
        if target is not None:
            target.zero_()
        check(f"{name}: {own}", relative_error(joined(call()), want), 5e-2 if own == "torch" else limit)
    return runs


def takes(implementation: str, op: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        with ihvp.use(implementation):
            ihvp.explain(op, **arguments)
    except RuntimeError:
        return False
    return True


def forced(name: str, op: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        with ihvp.use(name):
            return op(**arguments)

    return call


def measured(case: Case, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(case.precision)
    arguments = case.arguments()
    runs = compared(case.name, case.op, arguments, case.rival, case.limit)
    times = {name: milliseconds(call, repeats) for name, call in runs.items()}
    # A group's addresses are listed on the host, which no graph can hold; nor does it hold the reference's copies.
    alone = [] if case.host else [name for name in runs if name != "reference"]
    device = {name: device_milliseconds(runs[name], repeats) for name in alone}
    ours, theirs = case.expected
    flops = sum(stage.flops * stage.times for stage in case.ours)
    peak = PEAKS[case.ours[0].rate]
    return {
        "bench": "gpu",
        "case": case.name,
        "op": case.op,
        "dtype": case.dtype,
        "size": _gpu.size_of(tuple(arguments.values())),
        "milliseconds": times,
        "device_milliseconds": device,
        "ratios": {name: times["torch"] / own for name, own in times.items()},
        "device_ratios": {name: device["torch"] / own for name, own in device.items()},
        "share_of_peak": {name: flops / (own * 1e-3) / peak for name, own in {**times, **device}.items()},
        "expected_ratio": theirs / ours,
        "goal": case.goal,
        "gpu": torch.cuda.get_device_name(),
    }


def measured_plain(case: Plain, repeats: int) -> dict[str, Any]:
    """An op without a rival of its own, for the record of what is faster than the reference."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    arguments = case.arguments()
    runs = compared(case.name, case.op, arguments, None, LIMITS[case.dtype])
    return {
        "bench": "gpu every op",
        "case": case.name,
        "op": case.op,
        "dtype": case.dtype,
        "size": _gpu.size_of(tuple(arguments.values())),
        "milliseconds": {name: milliseconds(call, repeats) for name, call in runs.items()},
    }


def record(results: Iterable[dict[str, Any]], passed: bool) -> dict[str, Any]:
    """What `proven.json` may say of this device class: the least measured speedup over the reference of each kernel.

    Of ops and types that have no case here nothing is said: they are not chosen until they are measured.
    """
    if not passed:
        return {}
    speeds: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        times = result["milliseconds"]
        for name in sorted(set(times) & set(GPU)):
            own = speeds.setdefault(result["op"], {}).setdefault(name, {"speedup": {}, "sources": _gpu.sources(name)})
            kind = f"{result['size']} {result['dtype']}"
            least = min(own["speedup"].get(kind, math.inf), times["reference"] / times[name])
            own["speedup"][kind] = round(least, 2)
    return {_gpu.device_class(torch.device("cuda", torch.cuda.current_device())): dict(sorted(speeds.items()))}


def line(result: dict[str, Any]) -> str:
    """One call at a time, then the device alone, each with its ratio to torch."""
    cells = []
    for name, time in result["milliseconds"].items():
        cell = f"{name} {time:.3f} ms"
        if "ratios" in result:
            cell += f" ({result['ratios'][name]:.2f}x)"
        if name in result.get("device_milliseconds", {}):
            cell += f", device {result['device_milliseconds'][name]:.3f} ({result['device_ratios'][name]:.2f}x)"
        cells.append(cell)
    goal = f"  expected {result['expected_ratio']:.1f}x  goal {result['goal']:.1f}x" if "goal" in result else ""
    return f"{result['case']:<56}{'; '.join(cells)}{goal}"


def run(output: Path | None, proven: Path | None, passed: bool, quick: bool) -> None:
    """Check and time every case; append JSON lines to `output` and write the record for the package to `proven`."""
    if not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a CUDA device, and there is none; --expected prints what the counts predict")
    print(expected(), "\n")
    results, repeats = [], 5 if quick else 20
    cases = [functools.partial(measured, case, repeats) for case in CASES]
    cases += [functools.partial(measured_plain, plain, repeats) for plain in EVERY_OP]
    for measure in cases:
        result = measure()
        results.append(result)
        write(output, [result])  # at once: a run that is cut short has lost nothing
        print(line(result), flush=True)
    counts = [{**asdict(stage), "case": case.name} for case in CASES for stage in case.ours]
    write(output, [{"bench": "gpu counts", "stages": counts}])
    if proven is not None:
        proven.write_text(json.dumps(record(results, passed), indent=2) + "\n")
