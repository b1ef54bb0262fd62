"""The GPU kernels against tuned torch: what the counts predict, and what a GPU measures, answers checked first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import ihvp
import torch
from ihvp import ops
from ihvp.ops import _gpu
from ihvp.ops._registry import GPU, implementations
from torch import Tensor

from bench.measure import check, relative_error, write

# An H200 in FLOP/s and bytes/s: matrix rates of the datasheet, but bfloat16 and the copy as measured through torch.
PEAKS = {"bf16": 790e12, "tf32": 495e12, "tf32x3": 165e12, "fp32": 67e12}
BANDWIDTH = 4.3e12
LAUNCH = 4e-6  # seconds from one small kernel to the next
LISTING = 6e-6  # seconds in which the host looks at one layer of a group and lists its addresses, as measured

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Stage:
    """One kernel: its operations at a rate of PEAKS, the bytes that it must read and write, and how often it runs."""

    flops: float
    bytes: float
    rate: str
    times: int = 1

    @property
    def seconds(self) -> float:
        return self.times * (max(self.flops / PEAKS[self.rate], self.bytes / BANDWIDTH) + LAUNCH)


@dataclass(frozen=True)
class Case:
    """An op at a shape, the same computed by tuned torch, the stages of both, and what the ratio is meant to reach."""

    name: str
    op: str
    precision: str
    arguments: Callable[[], dict[str, Any]]
    rival: Callable[..., Any]
    ours: Sequence[Stage]
    theirs: Sequence[Stage]
    goal: float
    limit: float  # of the relative error
    host: float = 0.0  # seconds before our first kernel starts

    @property
    def expected(self) -> tuple[float, float]:
        return self.host + sum(stage.seconds for stage in self.ours), sum(stage.seconds for stage in self.theirs)


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=F32).to(dtype)


def basis(d: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(randn(d, d, dtype=F32)).Q.to(dtype)


# --- the corrected diagonal ------------------------------------------------------------------------------------


def diagonal(N: int, T: int, d: int) -> Case:
    M, p = N * T, d * d
    project = [Stage(2 * M * p, 4 * M * d, "bf16")] * 2

    def rival(Lambda: Tensor, a: Tensor, delta: Tensor, U_A: Tensor, U_G: Tensor) -> Tensor:
        g = torch.bmm((delta @ U_G).mT, a @ U_A)
        return Lambda.add_(g.square_().sum(0, dtype=F32))

    return Case(
        f"ekfac_diagonal_update_ N={N} T={T} {d}x{d} bf16",
        "ekfac_diagonal_update_",
        "medium",
        lambda: {
            "Lambda": torch.zeros(d, d, device="cuda"),
            "a": randn(N, T, d),
            "delta": randn(N, T, d),
            "U_A": basis(d, BF16),
            "U_G": basis(d, BF16),
        },
        rival,
        [*project, Stage(2 * M * p, 4 * M * d + 8 * p, "bf16")],
        [
            *project,
            Stage(2 * M * p, 4 * M * d + 2 * N * p, "bf16"),
            Stage(N * p, 4 * N * p, "fp32"),
            Stage(N * p, 2 * N * p, "fp32"),
        ],
        2.5,
        1e-2,
    )


# --- covariance, solves, scores --------------------------------------------------------------------------------


def covariance(M: int, d: int) -> Case:
    tiles = math.ceil(d / 128)
    half = (tiles + 1) / (2 * tiles)

    def rival(C: Tensor, x: Tensor) -> Tensor:
        return C.add_(torch.addmm(torch.zeros(d, d, dtype=BF16, device="cuda"), x[0].T, x[0]))

    return Case(
        f"covariance_update_ {M}x{d} bf16",
        "covariance_update_",
        "medium",
        lambda: {"C": torch.zeros(d, d, device="cuda"), "x": randn(1, M, d)},
        rival,
        [Stage(2 * M * d * d * half, 2 * M * d, "bf16"), Stage(d * d, 32 * d * d, "fp32")],
        [Stage(2 * M * d * d, 2 * M * d, "bf16"), Stage(d * d, 10 * d * d, "fp32")],
        1.6,
        1e-2,
    )


def solve(Q: int, d: int) -> Case:
    product = Stage(2 * Q * d**3, 8 * Q * d * d, "tf32x3")
    plain = Stage(2 * Q * d**3, 8 * Q * d * d, "fp32")

    def rival(V: Tensor, U_A: Tensor, U_G: Tensor, Lambda: Tensor, damping: float) -> Tensor:
        return U_G @ ((U_G.T @ V @ U_A) / (Lambda + damping)) @ U_A.T

    return Case(
        f"ekfac_solve Q={Q} {d}x{d} float32",
        "ekfac_solve",
        "highest",
        lambda: {
            "V": randn(Q, d, d, dtype=F32),
            "U_A": basis(d, F32),
            "U_G": basis(d, F32),
            "Lambda": randn(d, d, dtype=F32).abs(),
            "damping": 0.1,
        },
        rival,
        [product] * 4,
        [*[plain] * 4, Stage(Q * d * d, 8 * Q * d * d, "fp32")],
        1.5,
        1e-5,
    )


def scores(Q: int, N: int, T: int, d: int) -> Case:
    M, p = N * T, d * d
    gradients = Stage(2 * M * p, 4 * M * d + 2 * N * p, "bf16")
    dots = Stage(2 * Q * N * p, 2 * (Q + N) * p, "bf16")
    rows = [Stage(2 * Q * M * p, 2 * Q * p + 4 * M * d, "bf16")]
    query_first = [Stage(2 * M * p, 4 * M * d, "bf16", Q), Stage(2 * M * d, 6 * M * d, "fp32", 2 * Q)]

    def gradient_first(P: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return P.flatten(1) @ torch.bmm(delta.mT, a).flatten(1).T

    def by_query(P: Tensor, a: Tensor, delta: Tensor) -> Tensor:
        return torch.stack([((delta @ own) * a).sum((1, 2), dtype=F32) for own in P])

    ours = min([gradients, dots], rows, key=lambda stages: sum(stage.seconds for stage in stages))
    theirs = min([gradients, dots], query_first, key=lambda stages: sum(stage.seconds for stage in stages))
    return Case(
        f"gradient_dot Q={Q} N={N} T={T} {d}x{d} bf16",
        "gradient_dot",
        "medium",
        lambda: {"P": randn(Q, d, d), "a": randn(N, T, d), "delta": randn(N, T, d)},
        by_query if theirs is query_first else gradient_first,
        ours,
        theirs,
        1.5,
        1e-2,
    )


# --- many small layers -----------------------------------------------------------------------------------------


# Both layers of each of 250 adapters of rank 8, (O,I) of each.
LORA = [shape for i in range(250) for shape in ((8, (64, 96, 128)[i % 3]), ((64, 96, 128)[i % 3], 8))]


def grouped_scores(shapes: Sequence[tuple[int, int]], Q: int, N: int, T: int) -> Case:
    layers, p = len(shapes), sum(O * I for O, I in shapes)

    def rival(P: list[Tensor], a: list[Tensor], delta: list[Tensor]) -> Tensor:
        out = torch.zeros(Q, N, device="cuda")
        for own, x, d in zip(P, a, delta, strict=True):
            out += own.flatten(1) @ torch.bmm(d.mT, x).float().flatten(1).T
        return out

    moved = 2 * N * T * sum(O + I for O, I in shapes) + 4 * Q * p
    return Case(
        f"gradient_dot_grouped {layers} adapter layers Q={Q} N={N} T={T} bf16",
        "gradient_dot_grouped",
        "medium",
        lambda: {
            "P": [randn(Q, O, I, dtype=F32) for O, I in shapes],
            "a": [randn(N, T, I) for _, I in shapes],
            "delta": [randn(N, T, O) for O, _ in shapes],
        },
        rival,
        [
            # the queries meet each gradient in float32, outside the tensor cores
            Stage(2 * N * p * Q, moved, "fp32"),
            Stage(layers * Q * N, 4 * layers * Q * N, "fp32"),
        ],
        [
            Stage(2 * N * T * p / layers, moved / layers, "bf16", layers),
            Stage(2 * Q * N * p / layers, (6 * N * p + 4 * Q * p) / layers, "fp32", 3 * layers),
        ],
        5.0,
        1e-2,
        layers * LISTING,
    )


def grouped_solves(shapes: Sequence[tuple[int, int]], Q: int) -> Case:
    layers, p = len(shapes), sum(O * I for O, I in shapes)

    def rival(
        V: list[Tensor], U_A: list[Tensor], U_G: list[Tensor], Lambda: list[Tensor], damping: list[float]
    ) -> list[Tensor]:
        return [
            G @ ((G.T @ x @ A) / (own + shift)) @ A.T
            for x, A, G, own, shift in zip(V, U_A, U_G, Lambda, damping, strict=True)
        ]

    flops = sum(4 * Q * O * I * (O + I) for O, I in shapes)
    bases = sum(O * O + I * I for O, I in shapes)
    return Case(
        f"ekfac_solve_grouped {layers} adapter layers Q={Q} float32",
        "ekfac_solve_grouped",
        "highest",
        lambda: {
            "V": [randn(Q, O, I, dtype=F32) for O, I in shapes],
            "U_A": [basis(I, F32) for _, I in shapes],
            "U_G": [basis(O, F32) for O, _ in shapes],
            "Lambda": [randn(O, I, dtype=F32).abs() for O, I in shapes],
            "damping": [0.1] * layers,
        },
        rival,
        [Stage(flops, 4 * (2 * Q * p + p + bases), "tf32x3")],
        [
            Stage(flops / layers / 4, 8 * Q * p / layers, "fp32", 4 * layers),
            Stage(Q * p / layers, 12 * Q * p / layers, "fp32", 2 * layers),
        ],
        5.0,
        1e-5,
        layers * LISTING,
    )


CASES = (
    diagonal(64, 128, 1024),
    diagonal(64, 512, 1024),
    covariance(65536, 1024),
    solve(64, 1024),
    scores(16, 64, 128, 1024),
    scores(1, 64, 128, 1024),
    grouped_scores(LORA, 16, 64, 32),
    grouped_solves(LORA, 16),
)


def expected() -> str:
    """The table of what the counts predict on an H200, written down before anything is measured."""
    lines = [f"{'case':<66}{'GFLOP':>9}{'MB':>9}{'ms':>9}{'torch ms':>10}{'ratio':>7}{'goal':>6}"]
    for case in CASES:
        ours, theirs = case.expected
        flops = sum(stage.flops * stage.times for stage in case.ours) / 1e9
        moved = sum(stage.bytes * stage.times for stage in case.ours) / 1e6
        lines.append(
            f"{case.name:<66}{flops:9.1f}{moved:9.1f}{ours * 1e3:9.3f}{theirs * 1e3:10.3f}"
            f"{theirs / ours:7.1f}{case.goal:6.1f}"
        )
    return "\n".join(lines)


# --- measuring -------------------------------------------------------------------------------------------------


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of single runs between two events, after warming up."""
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


def widened(value: Any) -> Any:
    if isinstance(value, list):
        return [widened(x) for x in value]
    return value.double() if isinstance(value, Tensor) else value


def joined(result: Any) -> Tensor:
    return torch.cat([x.flatten() for x in result]) if isinstance(result, list) else result


def measured(case: Case, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(case.precision)
    arguments = case.arguments()
    op = getattr(ops, case.op)
    target = arguments.get("Lambda" if case.op == "ekfac_diagonal_update_" else "C")
    with ihvp.use("reference"):
        wide = widened(arguments)
        want = joined(op(**wide)).clone()
    del wide
    runs: dict[str, Callable[[], Any]] = {"torch": lambda: case.rival(**arguments)}
    for name in ("reference", *GPU):
        if name in implementations()[case.op] and (name not in GPU or _gpu.installed(name)):
            runs[name] = forced(name, op, arguments)
    times: dict[str, float] = {}
    for name, call in runs.items():
        if target is not None:
            target.zero_()
        check(f"{case.name}: {name}", relative_error(joined(call()), want), 5e-2 if name == "torch" else case.limit)
        times[name] = milliseconds(call, repeats)
    ours, theirs = case.expected
    flops = sum(stage.flops * stage.times for stage in case.ours)
    return {
        "bench": "gpu",
        "case": case.name,
        "op": case.op,
        "milliseconds": times,
        "ratios": {name: times["torch"] / own for name, own in times.items()},
        "share_of_peak": {name: flops / (own * 1e-3) / PEAKS[case.ours[0].rate] for name, own in times.items()},
        "expected_ratio": theirs / ours,
        "goal": case.goal,
        "gpu": torch.cuda.get_device_name(),
    }


def forced(name: str, op: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        with ihvp.use(name):
            return op(**arguments)

    return call


def record(results: Sequence[dict[str, Any]], passed: bool) -> dict[str, Any]:
    """What `proven.json` may say of this device class: the least measured speedup over the reference of each kernel.

    Of ops that have no case here nothing is said: they are not chosen until they are measured.
    """
    if not passed:
        return {}
    speeds: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        times = result["milliseconds"]
        for name in set(times) & set(GPU):
            entry = speeds.setdefault(result["op"], {}).setdefault(
                name, {"speedup": math.inf, "sources": _gpu.sources(name)}
            )
            entry["speedup"] = min(entry["speedup"], round(times["reference"] / times[name], 2))
    return {_gpu.device_class(torch.device("cuda", torch.cuda.current_device())): speeds}


def run(output: Path | None, proven: Path | None, passed: bool, quick: bool) -> None:
    """Check and time every case; append JSON lines to `output` and write the record for the package to `proven`."""
    if not torch.cuda.is_available():
        raise SystemExit("bench gpu needs a CUDA device, and there is none; --expected prints what the counts predict")
    print(expected(), "\n")
    results = []
    for case in CASES:
        result = measured(case, 5 if quick else 20)
        results.append(result)
        write(output, [result])  # at once: a run that is cut short has lost nothing
        own = "  ".join(
            f"{name} {time:.3f} ms ({result['ratios'][name]:.2f}x)" for name, time in result["milliseconds"].items()
        )
        print(f"{case.name:<66}{own}  expected {result['expected_ratio']:.1f}x  goal {case.goal:.1f}x", flush=True)
    counts = [{**asdict(stage), "case": case.name} for case in CASES for stage in case.ours]
    write(output, [{"bench": "gpu counts", "stages": counts}])
    if proven is not None:
        proven.write_text(json.dumps(record(results, passed), indent=2) + "\n")
