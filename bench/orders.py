"""Whether the cost model picks the right contraction order: every order of an op is measured on a grid of shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ihvp.ops._registry import Op, _ops
from torch import Tensor

from bench import problems
from bench.measure import Effort, machine, once, race, relative_error, require, write
from bench.ops import TOLERANCES
from bench.problem import Problem
from bench.products import threads
from bench.report import report

SLACK = 1.15  # the chosen order may take so many times the best one's time
SAMPLES = Effort(7, 0.5)
LARGEST = 4e9  # FLOP of a problem's cheapest order: the grid takes minutes

LAYERS = ((10, 512), (64, 64), (64, 577), (256, 256), (256, 1024), (768, 768))
POSITIONS = (1, 2, 3, 8, 32, 128, 512)
EXAMPLES = (4, 32)
TOKENS = [(N, T, O, I) for N, T, (O, I) in product(EXAMPLES, POSITIONS, LAYERS)]

GRIDS: dict[str, list[Callable[[], Problem]]] = {
    "ekfac_diagonal_update_": [partial(problems.diagonal, *shape) for shape in TOKENS],
    "ekfac_self_influence": [partial(problems.self_influence, *shape) for shape in TOKENS],
    "gradient_dot": [partial(problems.dot, Q, *shape) for Q, shape in product((1, 2, 4, 16, 64), TOKENS)],
    "gradient_dot_low_rank": [partial(problems.low_rank, Q, 8, *shape) for Q, shape in product((1, 4, 16), TOKENS)],
    "ghost_dot": [partial(problems.ghosts, 8, *shape) for shape in TOKENS if shape[1] > 1],
    "ghost_norm": [partial(problems.norms, *shape) for shape in TOKENS if shape[1] > 1],
    "weighted_ghost_dot": [
        partial(problems.weighted_ghosts, M, N, O, I) for M, N, (O, I) in product((1, 16, 64), (32, 256), LAYERS)
    ],
}


@contextlib.contextmanager
def forced(name: str, order: str) -> Iterator[None]:
    """Within this context the op runs in this order, whatever the cost model says."""
    plain, asked = Op.best, []

    def best(self: Op, *arguments: Any) -> str:
        if self.name != name:  # an op that this one is made of
            return plain(self, *arguments)
        asked.append(order)
        return order

    with mock.patch.object(Op, "best", best):
        yield
    if not asked:
        raise SystemExit(f"order {order!r} was not forced: the op did not ask its cost model")


def in_order(problem: Problem, order: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with forced(problem.op, order):
            return problem.run()

    return run


def measured(make: Callable[[], Problem], effort: Effort) -> dict[str, Any] | None:
    """None where the op has one order only."""
    problem = make()
    explanation = problem.explain()
    orders = [candidate.order for candidate in explanation.candidates]
    if len(orders) < 2:
        return None
    shapes = {name: list(x.shape) for name, x in problem.arguments.items() if isinstance(x, Tensor)}
    what = f"{problem.op} " + " ".join(f"{name}{tuple(shape)}" for name, shape in shapes.items())
    reference = problem.reference()
    first = {}
    for order in orders:
        if problem.target is not None:
            problem.target.zero_()
        result, first[order] = once(in_order(problem, order))
        error = relative_error(result.view(reference.shape), reference)
        require(f"{what}: {order}", error, TOLERANCES["highest"][problem.dtype])
    print(f"right  {what}: {', '.join(orders)}", flush=True)
    # The first call also met cold caches: the seconds of a second one say how often a sample repeats it.
    first = {order: once(in_order(problem, order))[1] for order in orders}
    timings = race({order: in_order(problem, order) for order in orders}, first, effort)
    best = min(orders, key=lambda order: timings[order].median)
    ratio = timings[str(explanation.order)].median / timings[best].median
    return {
        "bench": "orders",
        "op": problem.op,
        "shapes": shapes,
        "threads": torch.get_num_threads(),
        "chosen": explanation.order,
        "best": best,
        "ratio": ratio,
        "met": ratio <= SLACK,
        "seconds": timings,
        "predicted": dict(zip(orders, explanation.seconds, strict=True)),
    }


def run(quick: bool, count: int, pattern: str, output: Path | None) -> None:
    """Measure the ops whose name holds `pattern`; quick takes every seventh shape."""
    print(machine())
    wanted = [name for name, op in sorted(_ops.items()) if op.candidates is not None and pattern in name]
    if not wanted:
        raise SystemExit(f"--only {pattern!r} fits no op that has several contraction orders")
    without = [name for name in wanted if name not in GRIDS]
    if without:
        raise SystemExit(f"no grid of shapes for {', '.join(without)}; there are: {', '.join(GRIDS)}")
    records = []
    with threads(count):
        for name in wanted:
            for make in GRIDS[name][:: 7 if quick else 1]:
                if make().flops <= LARGEST:
                    record = measured(make, SAMPLES)
                    records += [record] if record else []
    if not records:
        raise SystemExit(f"of {', '.join(wanted)} no shape of the grid has several contraction orders")
    report(records)
    write(output, records)
