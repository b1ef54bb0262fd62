"""Wrong calls: an exception that names the argument, a target left as it was, and never a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import F16, F32, F64, SPECS, Call, make
from torch import Tensor

ARGUMENTS = [(op, name) for op, spec in SPECS.items() for name in spec.shapes]
MASKS = [(op, name) for op, spec in SPECS.items() for name in spec.masks]


def refused(call: Call, error: type[Exception], message: str) -> None:
    """It raises, and an in-place target keeps what it held."""
    before = call.target.clone() if isinstance(call.target, Tensor) and call.target.device.type == "cpu" else None
    with pytest.raises(error, match=message):
        call()
    if before is not None and before.layout == torch.strided:
        assert torch.equal(call.target.detach(), before)


# Of any tensor argument: what it becomes, and what is said.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "integer": (lambda x: x.nan_to_num().long(), TypeError, "^{} must be float32, .*got torch.int64"),
    "boolean": (lambda x: x > 0, TypeError, "^{} must be float32, .*got torch.bool"),
    "complex": (lambda x: x.to(torch.complex64), TypeError, "^{} must be float32, .*got torch.complex64"),
    "meta": (lambda x: x.to("meta"), ValueError, "^{} must hold data, got a meta tensor"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "^{} must be a dense tensor, got layout torch.sparse_coo"),
    "requires grad": (lambda x: x.clone().requires_grad_(), RuntimeError, "^{} requires grad"),
    "list": (lambda x: x.tolist(), TypeError, "^{} must be a torch.Tensor, got list"),
    "array": (lambda x: x.numpy(), TypeError, "^{} must be a torch.Tensor, got ndarray"),
    "number": (lambda x: 1.0, TypeError, "^{} must be a torch.Tensor, got float"),
    "scalar": (lambda x: x.new_ones(()), ValueError, r"{} must .*\(\)"),
    "too many dimensions": (lambda x: x[None, None], ValueError, r"\b{} must .*\(1, 1, "),
    "one feature more": (lambda x: torch.cat([x, x[..., :1]], -1), ValueError, r"{partners} must .*\d"),
    "one row more": (lambda x: torch.cat([x, x[:1]]), ValueError, r"{partners} must .*\d"),
}


# Right calls: another query, another feature.
FREE = {
    *(("one row more", op, "V") for op in ("eigenbasis_rotate", "ekfac_solve", "kfac_solve")),
    ("one row more", "gradient_dot", "P"),
    *(("one feature more", op, name) for op in ("ghost_norm", "per_sample_gradient") for name in ("a", "delta")),
}


WRONG = [(own, *argument) for own in CORRUPTIONS for argument in ARGUMENTS if (own, *argument) not in FREE]


@pytest.mark.parametrize(("corruption", "op", "name"), WRONG)
def test_a_wrong_tensor_is_named(corruption: str, op: str, name: str) -> None:
    change, error, message = CORRUPTIONS[corruption]
    call = make(op, {}, bias=True, masked=True)
    partners = rf"\b({'|'.join([*SPECS[op].shapes, *SPECS[op].masks])})"
    refused(
        call.replace(**{name: change(call.arguments[name])}),
        error,
        message.replace("{partners}", partners).replace("{}", name),
    )


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_missing_tensor_is_named(op: str, name: str) -> None:
    optional = name in ("U_A", "U_G") and op in ("ekfac_diagonal_update_", "ekfac_self_influence")
    error = ValueError if optional else TypeError
    refused(make(op, {}).replace(**{name: None}), error, "U_A and U_G must both" if optional else f"^{name} must be")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda mask: mask.float(), TypeError),
        (lambda mask: mask.tolist(), TypeError),
        (lambda mask: mask.numpy(), TypeError),
        (lambda mask: mask.to("meta"), ValueError),
        (lambda mask: mask.to_sparse(), ValueError),
        (lambda mask: mask[:-1], ValueError),
        (lambda mask: mask.mT, ValueError),
        (lambda mask: mask[..., None], ValueError),
        (lambda mask: mask[:, :0], ValueError),
    ],
)
@pytest.mark.parametrize(("op", "name"), MASKS)
def test_a_wrong_mask_is_named(op: str, name: str, change: Callable[[Tensor], Any], error: type[Exception]) -> None:
    call = make(op, {}, masked=True)
    refused(call.replace(**{name: change(call.arguments[name])}), error, f"^{name} must be ")


def ones(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# The sizes are those of op_cases.DIMS: N=5, T=4, I=7, O=3, Q=3.
WRONG_CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("covariance_update_", {"C": ones(8, 8)}, ValueError, r"^C must be \(I',I'\) = \(7, 7\), got \(8, 8\)"),
    ("covariance_update_", {"C": ones(7, 7, dtype=F16)}, TypeError, r"^C must be float32 or float64, got .*float16"),
    ("covariance_update_", {"x": ones(5, 4, 7, dtype=F64)}, TypeError, r"^C must be float64 for float64 operands"),
    ("covariance_update_", {"C": ones(1, 7).expand(7, 7)}, ValueError, r"^C .*overlaps? itself in memory"),
    ("covariance_update_", {"bias": True}, ValueError, r"^C must be \(I',I'\) = \(8, 8\), got \(7, 7\)"),
    ("covariance_update_", {"bias": 1}, TypeError, r"^bias must be True or False, got 1"),
    ("covariance_update_", {"bias": None}, TypeError, r"^bias must be True or False, got None"),
    ("eigenbasis_project", {"U": ones(7, 6)}, ValueError, r"^U must be \(I',I'\) = \(7, 7\), got \(7, 6\)"),
    ("eigenbasis_rotate", {"V": ones(7)}, ValueError, r"^V must be \(Q,O,I'\) or \(O,I'\), got \(7,\)"),
    ("eigenbasis_rotate", {"inverse": "yes"}, TypeError, r"^inverse must be True or False, got 'yes'"),
    ("ekfac_diagonal_update_", {"delta": ones(5, 5, 3)}, ValueError, r"^delta must be \(N,T,O\) with N=5, T=4"),
    ("ekfac_diagonal_update_", {"delta": ones(5, 3)}, ValueError, r"^delta must be .*got \(5, 3\)"),
    ("ekfac_diagonal_update_", {"Lambda": ones(7, 3)}, ValueError, r"^Lambda must be \(O,I'\) = \(3, 7\)"),
    ("ekfac_diagonal_update_", {"U_A": ones(7, 7, dtype=F64)}, TypeError, r"^Lambda must be float64"),
    ("ekfac_diagonal_update_", {"Lambda": ones(3, 1).expand(3, 7)}, ValueError, r"^Lambda .*overlaps? itself"),
    ("ekfac_self_influence", {"damping": -0.1}, ValueError, r"^damping must not be negative, got -0.1"),
    ("ekfac_self_influence", {"damping": [0.1]}, TypeError, r"^damping must be a number, got \[0.1\]"),
    ("ekfac_self_influence", {"damping": torch.inf}, ValueError, r"^damping must be finite, got inf"),
    ("ekfac_self_influence", {"damping": None}, TypeError, r"^damping must be a number, got None"),
    ("ekfac_self_influence", {"damping": True}, TypeError, r"^damping must be a number, got True"),
    ("ekfac_self_influence", {"damping": ones(1)}, TypeError, r"^damping must be a number"),
    ("ekfac_self_influence", {"damping": 10**400}, ValueError, r"^damping must be finite"),
    ("ekfac_solve", {"damping": torch.nan}, ValueError, r"^damping must be finite, got nan"),
    ("ekfac_solve", {"damping": [0.1, -1.0]}, ValueError, r"^damping must not be negative, got \[0.1, -1.0\]"),
    ("ekfac_solve", {"damping": [0.1, "x"]}, TypeError, r"^damping must be a number, got 'x'"),
    ("ekfac_solve", {"damping": "auto"}, TypeError, r"^damping must be a number"),
    ("ekfac_solve", {"damping": ""}, TypeError, r"^damping must be a number"),
    ("ekfac_solve", {"damping": b"\1"}, TypeError, r"^damping must be a number"),
    ("ekfac_solve", {"V": ones(3, 7, 3)}, ValueError, r"^U_A must be \(I',I'\) = \(3, 3\), got \(7, 7\)"),
    ("ghost_dot", {"a2": ones(5, 4, 6)}, ValueError, r"^a2 and delta2 must have the features of a1 and delta1, I=7"),
    ("ghost_dot", {"delta1": ones(3, 3, 3)}, ValueError, r"^delta1 must be \(N,T,O\) with N=3, T=2 as in a1"),
    ("ghost_norm", {"a": ones(5)}, ValueError, r"^a must be \(N,T,features\) or \(N,features\), got \(5,\)"),
    ("gradient_dot", {"P": ones(3, 7)}, ValueError, r"^P must be \(Q,O,I'\), got \(3, 7\)"),
    ("gradient_dot", {"P": ones(3, 7, 3)}, ValueError, r"^P must be \(Q,O,I'\) = \(3, 3, 7\), got \(3, 7, 3\)"),
    ("gradient_dot", {"per_token": 0}, TypeError, r"^per_token must be True or False, got 0"),
    ("gradient_dot_low_rank", {"R": ones(3, 3, 7)}, ValueError, r"^R must be \(Q,r,I'\) = \(3, 2, 7\)"),
    ("gradient_dot_low_rank", {"L": ones(3, 3)}, ValueError, r"^L must be \(Q,O,r\), got \(3, 3\)"),
    ("kfac_factorize", {"damping": -1}, ValueError, r"^damping must not be negative, got -1"),
    ("kfac_factorize", {"split": "none"}, ValueError, r"^split must be one of pi, even, got 'none'"),
    ("kfac_factorize", {"A": ones(7, 6)}, ValueError, r"^A must be a square matrix, got \(7, 6\)"),
    ("kfac_factorize", {"G": ones(0, 0)}, ValueError, r"^G must be a square matrix, got \(0, 0\)"),
    ("kfac_factorize", {"G": torch.eye(3, dtype=F64)}, TypeError, r"^A and G must both be float32 or both float64"),
    ("kfac_factorize", {"A": torch.eye(7, dtype=F16), "G": torch.eye(3, dtype=F16)}, TypeError, r"^A and G must both"),
    ("kfac_solve", {"L_A": ones(6, 6)}, ValueError, r"^L_A must be \(I',I'\) = \(7, 7\), got \(6, 6\)"),
    ("weighted_ghost_dot", {"weight": ones(7, 3)}, ValueError, r"^weight must be \(O,I'\) = \(3, 7\), got \(7, 3\)"),
    ("weighted_ghost_dot", {"a1": ones(3, 2, 7), "delta1": ones(3, 2, 3)}, ValueError, r"^a1 must be \(M,1,I\)"),
    ("weighted_ghost_dot", {"a2": ones(5, 1, 6)}, ValueError, r"^a2 must be \(N,1,I\) = \(5, 1, 7\)"),
    ("ghost_norm", {"metric": None}, TypeError, r"unexpected keyword argument 'metric'"),
]


@pytest.mark.parametrize(("op", "arguments", "error", "message"), WRONG_CALLS)
def test_wrong_calls(op: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    refused(make(op, {}).replace(**arguments), error, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": torch.eye(7) - 3 * torch.diag(torch.arange(7.0) == 4), "split": "even"}, r"^A \+ 0.316 I is not pos"),
        ({"G": -torch.eye(3), "split": "even"}, r"^G \+ 0.316 I is not positive definite"),
        ({"A": torch.eye(7), "G": ones(3, 3), "damping": 0.0}, r"^G \+ 0 I is not positive definite"),
        ({"G": -torch.eye(3)}, r"positive trace.*-1 of G"),
        ({"G": torch.full((3, 3), torch.inf)}, r"positive trace.*inf of G"),
        ({"A": torch.zeros(7, 7)}, r"positive trace.* 0 of A"),
        ({"A": torch.full((7, 7), torch.nan)}, r"positive trace.* nan of A"),
        ({"G": torch.full((3, 3), torch.nan), "split": "even"}, r"^G \+ .* is not positive definite"),
        ({"G": torch.full((3, 3), torch.inf), "split": "even"}, r"^G \+ .* is not positive definite"),
        (
            {"A": torch.eye(7).index_put([torch.tensor(6), torch.tensor(0)], torch.tensor(torch.nan))},
            r"^A \+ .* is not",
        ),
    ],
)
def test_a_factor_that_is_not_positive_definite_is_named(arguments: dict[str, Any], message: str) -> None:
    refused(make("kfac_factorize", {}).replace(**arguments), torch.linalg.LinAlgError, message)


def test_a_target_that_is_also_an_operand_is_refused() -> None:
    memory = ones(20, 7)
    with pytest.raises(ValueError, match=r"^C overlaps x in memory"):
        make("covariance_update_", {}).replace(C=memory[:7], x=memory)()
    assert torch.equal(memory, ones(20, 7))


def test_random_calls_are_refused_or_right() -> None:
    """In a process of its own, where a crash is a failure like any other."""
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "fuzz_ops.py", "2000", "0"], cwd=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    report = json.loads(run.stdout)
    assert report["failures"] == [], "\n".join(report["failures"])
    assert report["refused"] + report["answered"] == 2000
    assert min(report["refused"], report["answered"]) > 500
    assert set(report["refused by"]) == set(SPECS) == set(report["answered by"])
