"""The ops against their rivals: every answer is checked against float64, then all are timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import CASES, Case, Goal
from bench.measure import FULL, QUICK, Timing, check, machine, once, race, relative_error, write
from bench.memory import extra_memory
from bench.problem import Problem
from bench.products import processor_case, threads, torch_mm_counts
from bench.report import report
from bench.roofline import Peak, rates

LIBRARIES = ("torch.mm", "oneDNN", "OpenBLAS")
TORCH_MM = ("torch.mm", "torch.addmm_")  # what takes MKL's slower path on AMD
OURS = "ihvp"


# Relative errors of sums of some thousand terms: a few roundings times the square root of their number.
# Below torch's highest precision, of float32: what TF32 rounds an operand by.
TOLERANCES = {
    "highest": {torch.float32: 2e-5, torch.float64: 1e-13},
    "high": {torch.float32: 2**-11, torch.float64: 1e-13},
}


def checked(case: Case, problem: Problem, reference: Tensor, runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Every answer against float64; returns the seconds of each call."""
    limit = TOLERANCES[torch.get_float32_matmul_precision()][problem.dtype]
    seconds = {}
    for name, run in runs.items():
        if problem.target is not None:
            problem.target.zero_()
        result, seconds[name] = once(run)
        check(f"{case.name}: {name}", relative_error(result.view(reference.shape), reference), limit)
    return seconds


def figure(goal: Goal, timings: dict[str, Timing], families: dict[str, str], share: float) -> tuple[float, str]:
    """What was reached, and against whom."""
    if goal.against == "peak":
        return share, "peak"
    wanted = LIBRARIES if goal.against == "library" else (goal.against,)
    rivals = {name: timings[name].median for name, family in families.items() if family in wanted}
    best = min(rivals, key=rivals.__getitem__)
    return rivals[best] / timings[OURS].median, best


def counts(goal: Goal) -> bool:
    return goal.against not in TORCH_MM or torch_mm_counts()


def measured(case: Case, default_threads: int, copy: dict[int, dict[str, float]], quick: bool) -> dict[str, Any]:
    count = case.threads or default_threads
    problem = case.make()
    wanted = {family for goal in case.goals for family in (LIBRARIES if goal.against == "library" else [goal.against])}
    rivals = [rival for rival in problem.rivals if not quick or rival.family in wanted]
    runs: dict[str, Callable[[], Any]] = {OURS: problem.run} | {rival.name: rival.run for rival in rivals}
    families = {rival.name: rival.family for rival in rivals}
    with threads(count):
        reference = problem.reference()
        first = checked(case, problem, reference, runs)
        if any(goal.against == "one thread" for goal in case.goals):

            def one_thread() -> Tensor:
                with threads(1):
                    return problem.run()

            runs["one thread"], families["one thread"], first["one thread"] = one_thread, "one thread", 2 * first[OURS]
        peak = Peak(str(problem.dtype).removeprefix("torch."), count)
        timings = race({**runs, "peak": peak}, {**first, "peak": peak.first}, QUICK if quick else FULL)
        explanation = problem.explain()
    own, rate, moved = timings[OURS].median, peak.rate(timings.pop("peak")), problem.bytes(reference)
    share = problem.flops / own / rate
    goals = []
    for goal in case.goals:
        reached, rival = figure(goal, timings, families, share)
        goals.append(
            {
                "against": goal.against,
                "rival": rival,
                "least": goal.least,
                "figure": reached,
                "met": reached >= goal.least,
                "counts": counts(goal),
            }
        )
    return {
        "bench": "ops",
        "case": case.name,
        "op": problem.op,
        "threads": count,
        "precision": torch.get_float32_matmul_precision(),
        "implementation": explanation.implementation,
        "order": explanation.order,
        "flops": problem.flops,
        "bytes": moved,
        "peak_flops": rate,
        "share_of_peak": share,
        "share_of_copy": moved / own / copy[count]["copy"],
        "seconds": timings,
        "families": families,
        "goals": goals,
    }


def run(quick: bool, default_threads: int, pattern: str, precision: str, output: Path | None) -> None:
    """Print each case as it is measured and the tables at the end; append the records to `output`."""
    torch.set_float32_matmul_precision(precision)
    offered = [case for case in CASES if case.goals or not quick]
    chosen = [case for case in offered if fnmatchcase(case.name, f"*{pattern}*")]
    if not chosen:
        raise SystemExit(f"--only {pattern!r} fits no case; there are: " + "; ".join(case.name for case in offered))
    used = sorted({case.threads or default_threads for case in chosen})
    copy = {count: rates(count, QUICK if quick else FULL) for count in used}
    roofline = [{"bench": "roofline", "threads": count, "rates": own} for count, own in copy.items()]
    records: list[dict[str, Any]] = [{"bench": "processor", "case": processor_case(), "machine": machine()}, *roofline]
    records += [measured(case, default_threads, copy, quick) for case in chosen]
    records += extra_memory(default_threads, pattern, 2 if quick else 8)
    report(records)
    write(output, records)
