"""The extra memory of a call does not follow N O I': peak resident sizes, each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from memory_meter import J, O

Case = tuple[str, str | None, int, int]

# kernel, order, N, T: 2,048 positions, and GROWTH times as many, are whole chunks of every kernel.
GROWTH = 8
CASES: list[Case] = [
    ("ekfac_diagonal_update", "project_first", 2048, 1),
    ("ekfac_diagonal_update", "project_first", 32, 64),
    ("ekfac_diagonal_update", "gradient_first", 32, 64),
    ("ekfac_self_influence", None, 32, 64),
    ("gradient_dot", "query_first", 2048, 1),
    ("gradient_dot", "query_first", 32, 64),
    ("gradient_dot", "gradient_first", 32, 64),
]
FORMED: Case = ("per_sample_gradient", None, 32, 64)


def measured(cases: list[Case]) -> list[int]:
    run = subprocess.run(
        [sys.executable, "memory_meter.py"],
        input=json.dumps(cases),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def many_times(case: Case) -> Case:
    kernel, order, N, T = case
    return kernel, order, GROWTH * N, T


@pytest.fixture(scope="module")
def extra_bytes() -> dict[Case, int]:
    cases = [FORMED, *CASES]
    cases += [many_times(case) for case in cases]
    return dict(zip(cases, measured(cases), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_extra_memory_does_not_follow_the_examples(extra_bytes: dict[Case, int], case: Case) -> None:
    few, many = extra_bytes[case], extra_bytes[many_times(case)]
    assert many < 12 << 20  # the gradients whole: 64 MB, and 4 GB at T = 1
    assert many - few < 2 << 20


def test_the_meter_sees_gradients_that_are_formed(extra_bytes: dict[Case, int]) -> None:
    few, many = extra_bytes[FORMED], extra_bytes[many_times(FORMED)]
    whole = 4 * FORMED[2] * O * J
    pages = 1 << 16  # the meter counts whole pages, and the allocator's own among them
    assert few > whole and many - few > (GROWTH - 1) * whole - pages
