"""The ops on groups of layers agree with their formula layer by layer, and name what is wrong with a group."""

from __future__ import annotations

from typing import Any

import ihvp
import pytest
import torch
from grouped_cases import GROUPED, group_formula, make_group
from ihvp import ops
from op_cases import BF16, DTYPES, F32, F64
from tolerance import assert_close

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias and mask": {"bias": True, "masked": True},
    "flat": {"T": None, "bias": True, "masked": True},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed"},
    "one layer": {"widths": ((4, 3),)},
    "no examples": {"N": 0},
    "no positions": {"T": 0},
    "no queries": {"Q": 0},
}


@pytest.mark.parametrize("implementation", ("native", "reference"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", GROUPED)
def test_formula(op: str, case: str, dtype: torch.dtype, implementation: str) -> None:
    arguments = make_group(op, dtype, **CASES[case])
    with ihvp.use(implementation):
        got = getattr(ops, op)(**arguments)
    for x, want in zip(got if isinstance(got, list) else [got], group_formula(op, arguments), strict=True):
        assert x.dtype == (F64 if dtype == F64 else F32)
        assert_close(x, want, x.dtype, 3 * 70 * 66)


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        ("gradient_dot_grouped", {"P": []}, ValueError, "P must be a list of one tensor a layer"),
        ("gradient_dot_grouped", {"a": torch.ones(4, 3, 5)}, ValueError, "a must be a list of 4 tensors as P is"),
        ("gradient_dot_grouped", {"delta": [torch.ones(4, 3, 3)]}, ValueError, "delta must be a list of 4 tensors"),
        ("gradient_dot_grouped", {"mask": torch.ones(4, 2, dtype=torch.bool)}, ValueError, "mask.* must be"),
        ("gradient_dot_grouped", {"bias": True}, ValueError, r"P\[0\] must be \(Q,O,I'\) = \(5, 3, 6\)"),
        ("gradient_dot_grouped", {"bias": 1}, TypeError, "bias must be True or False"),
        ("ekfac_solve_grouped", {"damping": 0.1}, ValueError, "damping must be a list of 4 numbers"),
        ("ekfac_solve_grouped", {"damping": [0.1]}, ValueError, "damping must be a list of 4 numbers"),
        ("ekfac_solve_grouped", {"damping": [0.1, -1.0, 0.1, 0.1]}, ValueError, "damping must not be negative"),
        ("ekfac_solve_grouped", {"U_G": [torch.eye(2)] * 4}, ValueError, r"U_G\[0\] must be \(O,O\) = \(3, 3\)"),
    ],
)
def test_wrong_groups_are_named(op: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(ops, op)(**{**make_group(op), **changes})


def test_layers_of_other_dtypes_or_lengths_are_named() -> None:
    arguments = make_group("gradient_dot_grouped")
    arguments["a"][1] = arguments["a"][1].to(BF16)
    with pytest.raises(TypeError, match=r"a\[1\] must be torch.float32 as its first layer is, got torch.bfloat16"):
        ops.gradient_dot_grouped(**arguments)
    arguments = make_group("gradient_dot_grouped")
    arguments["a"][2], arguments["delta"][2] = torch.ones(4, 2, 66), torch.ones(4, 2, 16)
    with pytest.raises(ValueError, match=r"a\[2\] must be \(N,T,I\) = \(4, 3, 66\), got \(4, 2, 66\)"):
        ops.gradient_dot_grouped(**arguments)
    arguments = make_group("gradient_dot_grouped")
    arguments["a"][2] = torch.ones(())
    with pytest.raises(ValueError, match=r"a\[2\] must be \(N,T,features\) or \(N,features\), got \(\)"):
        ops.gradient_dot_grouped(**arguments)


@pytest.mark.parametrize("op", GROUPED)
def test_groups_trace_and_explain(op: str) -> None:
    arguments = make_group(op)
    assert ihvp.explain(getattr(ops, op), **arguments).implementation == "native"
    with ihvp.use("triton"), pytest.raises(RuntimeError, match=f'{op} has no "triton" implementation for cpu'):
        getattr(ops, op)(**arguments)
