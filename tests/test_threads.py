"""Determinism, threads and processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from op_cases import NATIVE_OPS, Call, make


def native_call(op: str) -> Call:
    """Several panels, several positions, more than one chunk of examples."""
    return make(op, {"N": 530, "T": 4, "I": 90, "O": 50, "Q": 40}, bias=True, masked=True)


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_same_bits_in_every_run_and_for_any_threads(isa: str, op: str) -> None:
    call, results = native_call(op), []
    for threads in (1, *(2, 3) * 3):  # several times: threads in each other's way need luck to meet
        torch.set_num_threads(threads)
        results.append(call.fresh()())
    call.check(results[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_calls_from_several_threads() -> None:
    calls = [native_call(op) for op in NATIVE_OPS]
    alone = [call.fresh()() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda call: call.fresh()(), calls))
            assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


FORK = """
import faulthandler, os, torch
from op_cases import NATIVE_OPS, make

faulthandler.dump_traceback_later(300, exit=True)  # a hang becomes a failure with a traceback
calls = [make(op, {"N": 300, "I": 90, "O": 50}) for op in NATIVE_OPS]
torch.set_num_threads(2)
before = [call.fresh()() for call in calls]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = all(torch.equal(call.fresh()(), x) for call, x in zip(calls, before))
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(torch.equal(call.fresh()(), x) for call, x in zip(calls, before))
"""


def test_calls_in_a_forked_child() -> None:
    child = subprocess.run([sys.executable, "-c", FORK], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
